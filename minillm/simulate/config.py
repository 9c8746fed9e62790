"""What is to be simulated: the sections of a training run, and the GPUs it shall run on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

from minillm.data.config import DataConfig
from minillm.distributed.config import ParallelConfig
from minillm.distributed.device import DATASHEET_BF16
from minillm.log import LogConfig
from minillm.lora import LoRAConfig
from minillm.model.config import ModelConfig, ModelSection
from minillm.model.presets import preset
from minillm.model.transformer import Transformer
from minillm.optim import OptimConfig
from minillm.recipe.dpo import DPOConfig
from minillm.recipe.sft import SFTConfig
from minillm.recipe.tuning import freeze, with_adapters
from minillm.run import RunConfig
from minillm.tokenizer import TokenizerConfig, load_tokenizer
from minillm.trainer import TrainConfig

# GiB that torch sees on each of the GPUs of DATASHEET_BF16, from the makers' datasheets.
MEMORY_GIB = {"H200": 139, "H100": 79, "A100": 79, "B200": 178, "L40S": 44, "4090": 23.5}
BATCH_TOKENS = 524_288  # where none is given: what `recommend` gives large corpora
SEQ_LEN = 1024


@dataclass(frozen=True)
class PlannedText(DataConfig):
    """The text of a run of any script; how its rows are read changes nothing of what the run takes."""

    columns: Annotated[list[str], "as in sft.py and dpo.py"] = field(default_factory=list)
    max_samples: Annotated[int | None, "as in sft.py and dpo.py"] = None


@dataclass(frozen=True)
class Plan:
    """Options of `plan`."""

    gpus: Annotated[int, "how many", ">= 1"] = 8
    gpus_per_node: Annotated[int, "of which so many share a machine", ">= 1"] = 8
    gpu: Annotated[str, f"what they are: {', '.join(DATASHEET_BF16)}"] = "H100"
    gpu_memory: Annotated[float | None, "GiB of each; none: that of the GPU", "> 0"] = None
    peak_flops: Annotated[float | None, "bf16 FLOP/s of each; none: the GPU's datasheet", "> 0"] = None
    mfu: Annotated[float, "share of the peak that is reached while computing", "> 0, <= 1"] = 0.4
    node_bandwidth: Annotated[float, "bytes a second that a GPU sends inside a node", "> 0"] = 450e9
    network_bandwidth: Annotated[float, "bytes a second that a GPU sends between nodes", "> 0"] = 50e9
    price: Annotated[float | None, "of a GPU for an hour", "> 0"] = None
    json: Annotated[bool, "one JSON object instead of tables"] = False
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelSection = field(default_factory=ModelSection)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: PlannedText = field(default_factory=PlannedText)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    log: LogConfig = field(default_factory=LogConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)

    def __post_init__(self):
        if self.gpu not in DATASHEET_BF16:
            raise ValueError(
                f"gpu: {self.gpu} is not known ({', '.join(DATASHEET_BF16)}); "
                "name the nearest, and give gpu_memory and peak_flops"
            )
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(f"gpus: {self.gpus} do not fill nodes of {self.gpus_per_node}; set gpus_per_node")

        if self.lora.r and self.parallel.tp > 1:
            raise ValueError(
                "parallel.tp: adapters are not cut by tensor parallelism; leave parallel.tp, or lora.r, out"
            )

    @property
    def memory_of_gpu(self) -> float:
        """GiB."""
        return self.gpu_memory or MEMORY_GIB[self.gpu]

    @property
    def peak_of_gpu(self) -> float:
        """FLOP/s."""
        return self.peak_flops or DATASHEET_BF16[self.gpu]


@dataclass(frozen=True)
class Run:
    """What is simulated, with nothing left open."""

    model: ModelConfig
    optim: OptimConfig
    seq_len: int
    samples: int  # of seq_len tokens, a step
    precision: str
    assumed: tuple[str, ...]  # what was given nowhere
    adapt: Callable[[Transformer], object] | None = None  # freezes weights and adds adapters; None: all is trained

    @property
    def batch_tokens(self) -> int:
        return self.samples * self.seq_len


def completed_run(plan: Plan) -> Run:
    """The run that the sections describe; what they leave open is assumed, and said. Raises ValueError."""
    assumed = []
    vocab_size = plan.model.vocab_size or vocabulary(plan)
    model = plan.model.to_config(vocab_size=vocab_size)
    seq_len, batch_tokens = plan.data.seq_len, plan.train.batch_tokens
    if seq_len is None:
        seq_len = min(model.max_seq_len, SEQ_LEN)
        assumed.append(f"data.seq_len {seq_len}")
    if seq_len > model.max_seq_len:
        raise ValueError(f"data.seq_len: {seq_len} is longer than model.max_seq_len {model.max_seq_len}")
    if batch_tokens is None:
        batch_tokens = max(1, BATCH_TOKENS // seq_len) * seq_len
        assumed.append(f"train.batch_tokens {batch_tokens}")
    if batch_tokens % seq_len:
        raise ValueError(f"train.batch_tokens: {batch_tokens} is no multiple of data.seq_len {seq_len}")
    precision = "bf16" if plan.train.precision == "auto" else plan.train.precision
    in_full = not (plan.lora.r or plan.sft.frozen or plan.dpo.frozen)
    adapt = None if in_full else partial(as_trained, plan=plan)
    return Run(model, plan.optim, seq_len, batch_tokens // seq_len, precision, tuple(assumed), adapt)


def as_trained(model: Transformer, plan: Plan) -> None:
    """What sft.py or dpo.py does to a model: what is frozen, and which adapters there are."""
    freeze(model, plan.sft.frozen, "sft.frozen")
    freeze(model, plan.dpo.frozen, "dpo.frozen")
    with_adapters(model, plan.lora)


def vocabulary(plan: Plan) -> int:
    """Tokens of the tokenizer that the sections describe, as far as that is known before there is text."""
    tokenizer = plan.tokenizer
    if tokenizer.path is not None:
        return load_tokenizer(tokenizer.path).vocab_size
    if tokenizer.vocab_size is not None:
        return tokenizer.vocab_size
    if plan.model.preset is not None:
        return preset(plan.model.preset).vocab_size
    raise ValueError("tokenizer.vocab_size: a plan needs to know it before there is text; give it, or model.vocab_size")


def tokens_of(plan: Plan, run: Run, hoffmann: float) -> tuple[int, str]:
    """How many tokens are trained on, and who says so."""
    limits = {
        "train.max_steps": plan.train.max_steps and plan.train.max_steps * run.batch_tokens,
        "train.max_tokens": plan.train.max_tokens,
    }
    given = {name: tokens for name, tokens in limits.items() if tokens}
    if not given:
        return round(hoffmann), "compute-optimal, Hoffmann et al. 2022"
    name = min(given, key=given.__getitem__)
    return given[name], name
