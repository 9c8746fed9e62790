"""Tensor parallel: the ranks of the tp axis compute every layer of one batch together, each with a part of the weights.

How it works. A pair of matrices is cut so that nothing is sent between the two: the first by its outputs (q, k, v,
gate, up: a rank has some heads, some of the MLP's width), the second by its inputs (o, down), and the sum of what the
ranks get is the result (Shoeybi et al. 2019, arXiv:1909.08053). Around the pairs each rank holds a part of the
sequence, so that norms, dropout and the residual stream are cut too (Korthikanti et al. 2022, arXiv:2205.05198):

    residual, norm   (B, T/tp, D)   all-gather      -> (B, T, D)
    q, k, v or up    a rank's heads or width, over the whole sequence
    o or down        (B, T, D), partial sums        reduce-scatter -> (B, T/tp, D)

The embedding and lm_head are cut by rows of the vocabulary; minillm/losses/shard.py makes the loss of that. All ranks
get the same batch and find the same loss. docs/parallelism.md counts what is stored and sent.

Shapes: B batch, T time, D dim, H heads, d head_dim.
"""

import math
import re
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from minillm.losses import matmul_dtype
from minillm.model.config import ModelConfig
from minillm.tensors import is_sharded

if TYPE_CHECKING:  # asked for only where it is used: to import it takes most of a second
    from torch.distributed.tensor.parallel import ParallelStyle

CUT = {"n_heads": "query heads", "n_kv_heads": "key/value heads", "ffn_dim": "columns of the MLP"}


def tensor_parallel_problems(config: ModelConfig, tp: int, seq_len: int | None = None) -> list[str]:
    """One line, starting with a field's name, for each thing about the model that tp ranks cannot share."""
    problems = [
        f"parallel.tp: {tp} does not divide model.{name} {getattr(config, name)}: a rank takes equally many {what}"
        for name, what in CUT.items()
        if getattr(config, name) % tp
    ]
    rows, multiple = config.padded_vocab_size, math.lcm(config.vocab_multiple, tp)
    if rows % tp:
        problems.append(
            f"model.vocab_multiple: {config.vocab_multiple} leaves a number of rows in the vocabulary that parallel.tp "
            f"{tp} does not divide; set it to {multiple}"
        )
    elif config.vocab_size <= rows - rows // tp:
        problems.append(
            f"model.vocab_multiple: {config.vocab_multiple} pads a vocabulary of {config.vocab_size} to {rows} rows, "
            f"of which the last of parallel.tp {tp} ranks would hold only padding; set it to {tp}"
        )
    if config.position == "learned" and config.max_seq_len % tp:
        problems.append(
            f"model.max_seq_len: {config.max_seq_len} learned positions cannot be cut into parallel.tp {tp} equal parts"
        )
    if seq_len is not None and seq_len % tp:
        problems.append(
            f"data.seq_len: {seq_len} tokens cannot be cut into parallel.tp {tp} equal parts; "
            f"{max(tp, seq_len // tp * tp)} can"
        )
    return problems


def styles() -> "dict[str, list[ParallelStyle]]":
    """How each module is cut and what it is handed, by name, with a star for the number of a block."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        PrepareModuleOutput,
        RowwiseParallel,
        SequenceParallel,
    )

    whole, part = Replicate(), Shard(1)  # of the sequence: (B, T, D) or (B, T/tp, D)
    table = RowwiseParallel(input_layouts=whole, output_layouts=part)
    # dim 1 of what these normalise is time, or the heads: (B, T/tp, D), (B, H/tp, T, d)
    norm = SequenceParallel(sequence_dim=1, use_local_output=True)
    gathered = PrepareModuleOutput(output_layouts=part, desired_output_layouts=whole)
    first, second = ColwiseParallel(), RowwiseParallel(output_layouts=part)

    def read_whole(arguments: int) -> PrepareModuleInput:
        """Gathers the first of a module's arguments, once for all that read it."""
        rest = (None,) * (arguments - 1)
        return PrepareModuleInput(input_layouts=(part, *rest), desired_input_layouts=(whole, *rest))

    return {
        "embed": [table],
        "pos_embed": [table],
        "blocks.*.attn_norm": [norm],
        "blocks.*.attn": [read_whole(4)],  # x, rope, mask, cache
        "blocks.*.attn.q_proj": [first],
        "blocks.*.attn.k_proj": [first],
        "blocks.*.attn.v_proj": [first],
        "blocks.*.attn.q_norm": [norm],
        "blocks.*.attn.k_norm": [norm],
        "blocks.*.attn.o_proj": [second],
        "blocks.*.mlp_norm": [norm],
        "blocks.*.mlp": [read_whole(1)],
        "blocks.*.mlp.gate_proj": [first],
        "blocks.*.mlp.up_proj": [first],
        "blocks.*.mlp.down_proj": [second],
        "norm": [norm, gathered],
        "lm_head": [ColwiseParallel(output_layouts=whole)],
    }


def apply_tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Cut a Transformer, in place, over the ranks of a mesh of one axis, tp; also on the meta device.

    Every parameter becomes a DTensor on that mesh, and the model is called as before, with the same batch on each rank,
    whose length the ranks divide. Raises ValueError for a model that they cannot share.
    """
    from torch.distributed.tensor.parallel import PrepareModuleInput, parallelize_module

    if problems := tensor_parallel_problems(model.config, mesh.size()):
        raise ValueError("\n".join(problems))
    for name, module in model.named_modules():
        if name.endswith("_proj") and not isinstance(module, nn.Linear):
            raise ValueError(
                f"parallel.tp: {name} is a {type(module).__name__}, and only nn.Linear can be cut; share the work by "
                "parallel.dp_shard instead"
            )
    table = styles()
    for name, module in list(model.named_modules()):
        for style in table.get(re.sub(r"\d+", "*", name), []):
            if not isinstance(module, nn.Identity):  # in the place of a norm that the model does not have
                if isinstance(style, PrepareModuleInput):
                    module.register_forward_pre_hook(in_matmul_dtype)  # before it is gathered
                parallelize_module(module, mesh, style)
    model.tie_embeddings()  # each of the two was cut by itself
    for module in (model.embed, getattr(model, "pos_embed", None)):
        if module is not None:
            module.register_forward_hook(wait)
    model.register_forward_pre_hook(check_input, with_kwargs=True)
    model.register_forward_pre_hook(reduce_gradients)


def in_matmul_dtype(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What only matrix products will read is sent in their dtype: under autocast half the bytes."""
    x, *rest = args
    return x.to(matmul_dtype(x)), *rest


def wait(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Ends the collective that brings the output: compiled blocks send no gradient to one that is still under way."""
    return output.clone()


def check_input(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises ValueError for what ranks cannot share; a length that they do not divide would end the process."""
    tp, T = model.embed.weight.device_mesh["tp"].size(), (args[0] if args else kwargs["tokens"]).shape[1]
    if kwargs.get("caches") is not None:
        raise ValueError(
            "a model that tensor-parallel ranks share does not generate: save it, and load it on one process"
        )
    if T % tp:
        raise ValueError(f"{T} tokens cannot be cut into parallel.tp {tp} equal parts; pad to {-(-T // tp) * tp}")


def reduce_gradients(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Sees to it that weights which all ranks have get the sum of the gradients of their parts of the sequence.

    FSDP2 does that by itself. It is asked for again at each forward because `to_empty` makes new parameters.
    """
    for parameter in model.parameters():
        shared = is_sharded(parameter) and parameter.device_mesh.ndim == 1 and parameter.placements[0].is_replicate()
        if shared and parameter.requires_grad and not parameter._backward_hooks:
            parameter.register_hook(summed)


def summed(gradient: Tensor) -> Tensor:
    """A DTensor of partial sums, as one that is the same on all ranks."""
    from torch.distributed.tensor import Replicate

    return gradient.redistribute(placements=[Replicate()])
