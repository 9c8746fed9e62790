"""What memory a rank takes in truth: the tensors alive at the peak of a real step, and what it holds of any model."""

import weakref

import torch
import torch.distributed as torch_dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillm.data.batch import Batch
from minillm.distributed.config import Layout
from minillm.distributed.context import Context, connect, with_mesh
from minillm.distributed.parallelize import ONE, gradient_sync, parallelize
from minillm.memory import Setting
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.objectives import NextToken
from minillm.optim import OptimConfig, build_optimizer, optimizer_tensors
from minillm.tensors import parameter_names

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors alive of those that any operation reads or makes; of DTensors the local parts.

    Memory that changes its size in place, as that of FSDP2's weights does, counts as large as it is.
    """

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # what it does is seen when it calls operations on its local part
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                self.add(leaf.untyped_storage())
        self.peak = max(self.peak, self.live())
        return result

    def add(self, storage):
        key = storage._cdata
        if key not in self.storages:
            self.storages[key] = weakref.ref(storage, lambda _: self.storages.pop(key, None))

    def live(self):
        """Bytes alive now."""
        found = (reference() for reference in list(self.storages.values()))
        return sum(storage.nbytes() for storage in found if storage is not None)


def fill(model):
    """Weights of no particular value, whatever shards they lie in."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)


def measured_peaks(cases: list[tuple[ModelConfig, OptimConfig, Setting]], layout: Layout = ONE) -> list[int]:
    """Bytes at the peak of a real step of this rank, on the CPU, for each case."""
    with connect("cpu") as dist:
        dist = with_mesh(dist, layout.dp_replicate, layout.dp_shard, layout.tp)
        return [measured_peak(*case, layout, dist) for case in cases]


def measured_peak(config: ModelConfig, optim: OptimConfig, setting: Setting, layout: Layout, dist: Context) -> int:
    """Of the second step, when all buffers are there."""
    with torch.device("meta"):
        model = Transformer(config)
    if setting.adapt:
        setting.adapt(model)
    with Live() as live:
        called = parallelize(
            model,
            setting.activation_checkpointing,
            dist=dist,
            layout=layout,
            dtype=DTYPES[setting.precision],
            reshard_after_forward=setting.reshard_after_forward,
            init=fill,
        )
        optimizer = build_optimizer(model, optim)
        optimizer_tensors(optimizer, parameter_names(model))
        objective, forwards = NextToken(config.vocab_size), 2 if setting.accumulates else 1
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            live.peak = 0
            for index in range(forwards):
                tokens = torch.randint(0, config.vocab_size, (setting.rows, setting.seq_len))
                with gradient_sync(called, last=index + 1 == forwards):
                    with torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "bf16"):
                        loss, _ = objective(called, Batch(tokens, tokens.clone()))
                    loss.backward()
                del loss
            optimizer.step()
    return live.peak


def held_bytes(config: ModelConfig, optim: OptimConfig, layout: Layout) -> tuple[int, int, int]:
    """(parameters, gradients, moments) in bytes on the first of any number of ranks, of a model of any size.

    The ranks are those of a process group that sends nothing, and the tensors have shapes but no memory; what cuts the
    model and runs it forward and backward is the real thing.
    """
    dp_size = layout.dp_replicate * layout.dp_shard
    world_size = dp_size * layout.tp
    torch_dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        dist = Context(torch.device("cpu"), 0, world_size, dp_rank=0, dp_size=dp_size)
        dist = with_mesh(dist, layout.dp_replicate, layout.dp_shard, layout.tp)
        with torch.device("meta"):
            model = Transformer(config)
        parallelize(model, dist=dist, layout=layout)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            model(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
        named = parameter_names(model)
        moments = optimizer_tensors(build_optimizer(model, optim), named)
    finally:
        torch_dist.destroy_process_group()

    def local_bytes(tensors):
        parts = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
        return sum(part.numel() * part.element_size() for part in parts)

    gradients = [parameter.grad for parameter in named.values()]
    return local_bytes(named.values()), local_bytes(gradients), local_bytes(moments.values())
