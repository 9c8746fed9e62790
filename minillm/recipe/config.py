"""The sections that every recipe has, and what must hold between them."""

from dataclasses import dataclass, field

import torch

from minillm.data.config import DataConfig
from minillm.distributed.config import ParallelConfig
from minillm.distributed.tensor_parallel import tensor_parallel_problems
from minillm.log import LogConfig
from minillm.model.config import ModelSection
from minillm.model.transformer import Transformer
from minillm.optim import OptimConfig, unmatched_patterns
from minillm.run import RunConfig
from minillm.tokenizer import TokenizerConfig
from minillm.trainer import TrainConfig


@dataclass(frozen=True)
class RecipeConfig:
    """A training run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelSection = field(default_factory=ModelSection)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self):
        if problems := self.problems():
            raise ValueError("\n".join(problems))

    def problems(self) -> list[str]:
        """What contradicts itself, a line each."""
        seq_len, batch_tokens = self.data.seq_len, self.train.batch_tokens
        problems = []
        if seq_len and seq_len > self.model.max_seq_len:
            problems.append(f"data.seq_len: {seq_len} is longer than model.max_seq_len {self.model.max_seq_len}")
        if seq_len and batch_tokens and batch_tokens % seq_len:
            nearest = max(1, round(batch_tokens / seq_len)) * seq_len
            problems.append(
                f"train.batch_tokens: {batch_tokens} is no multiple of data.seq_len {seq_len}; {nearest} is the nearest"
            )
        if not self.model.causal:
            problems.append("model.causal: false lets a token see the one that it is trained to predict; leave it true")
        if self.parallel.tp > 1:
            rows = self.model.vocab_size or self.model.vocab_multiple  # there is no tokenizer yet
            problems += tensor_parallel_problems(self.model.to_config(vocab_size=rows), self.parallel.tp, seq_len)
        if self.optim.lr_scales:  # looked at here, and not when hours of tokenising are over
            with torch.device("meta"):
                problems += unmatched_patterns(Transformer(self.model.to_config(vocab_size=1)), self.optim)
        return problems
