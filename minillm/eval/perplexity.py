"""The only evaluation loop: the mean loss over all target tokens of a set, and what follows from it.

Loss depends on the tokenizer: a longer vocabulary makes fewer, harder tokens of the same text. Bits per byte do not:
they divide by the bytes of the text itself.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter

import torch
from torch import Tensor, nn

from minillm.data.batch import Batch
from minillm.losses import IGNORE_INDEX
from minillm.objectives import Objective
from minillm.tokenizer import Tokenizer

# Batches. Reading waits for the device; but on a CPU what is not read lies between the large tensors of each batch, and
# what those leave cannot be used again: with 1024 a process grew by 0.4 GB in 300 batches, with 16 by nothing.
READ_EVERY = 16


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    objective: Objective,
    token_bytes: Tensor | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
    device: torch.device | None = None,
) -> dict[str, float]:
    """The objective's mean over all units of all batches, in evaluation mode, without gradients.

    Args:
        objective: one of minillm.objectives, or another with its `count` and call.
        token_bytes: (V,), the length in bytes of each token, from `token_byte_lengths`; without it no bits per byte.
        reduce: sums a float64 tensor over the ranks, where each of them evaluates a part.
        device: where the model is, if the batches are not there: units and bytes are then counted where they are.

    Returns: val_loss (nats a unit), val_NAME for each metric that counted anything, tokens (units), perplexity (e to
        the loss); with token_bytes also bytes (of the target tokens; special tokens have none) and val_bpb, the bits
        it takes on average to write down a byte of the text, special tokens included in the bits.

    Run it inside the autocast that training uses. Raises ValueError where no batch has a unit to evaluate.
    """
    sums: dict[str, list[float]] = {"loss": [], "units": []}
    unread: dict[str, list[Tensor]] = {}
    with evaluation_mode(model):
        for batch in batches:
            loss_sum, metrics = objective(model, batch if device is None else batch.to(device))
            reported, _ = metrics.get("loss", (loss_sum, None))  # where that is not what is minimised
            parts = {"loss": reported, "units": objective.count(batch)}
            if token_bytes is not None:
                parts["bytes"] = token_bytes[batch.targets[batch.targets != IGNORE_INDEX]].sum()
            for name, (metric_sum, count) in metrics.items():
                parts |= {f"{name}.sum": metric_sum, f"{name}.count": count}
            for name, value in parts.items():
                unread.setdefault(name, []).append(torch.as_tensor(value))
            if len(unread["loss"]) == READ_EVERY:
                read_sums(unread, sums)
    read_sums(unread, sums)
    totals = list(map(math.fsum, sums.values()))  # rounded once, however many batches there are
    reduced = torch.tensor(totals, dtype=torch.float64)
    total = dict(zip(sums, (reduce(reduced) if reduce else reduced).tolist()))
    if not total["units"]:
        raise ValueError("nothing to evaluate: no batch has a target")
    val_loss = total["loss"] / total["units"]
    result = {"val_loss": val_loss, "perplexity": exp(val_loss), "tokens": int(total["units"])}
    if token_bytes is not None:
        result["bytes"] = int(total["bytes"])
        result["val_bpb"] = total["loss"] / math.log(2) / total["bytes"] if total["bytes"] else math.inf
    names = [name.removesuffix(".count") for name in total if name.endswith(".count")]
    counted = [name for name in names if total[f"{name}.count"]]
    return result | {f"val_{name}": total[f"{name}.sum"] / total[f"{name}.count"] for name in counted}


def read_sums(unread: dict[str, list[Tensor]], into: dict[str, list[float]]) -> None:
    """Move the sums of some batches from the device to the host."""
    for name, values in unread.items():
        into.setdefault(name, []).extend(torch.stack(values).tolist())
    unread.clear()


def mixture(parts: Sequence[tuple[str, float, Mapping[str, float]]]) -> dict[str, float]:
    """The figures of a mixture from those that `evaluate` gives for each source.

    Args: (name, share of the samples, figures) of each source, all of them with bytes or none.

    Returns: val_loss of a unit, and what else is a mean over units, as they come in the mixture; perplexity; with bytes
        val_bpb of a byte; and val_loss/NAME and val_bpb/NAME of each source. What one source has no figure of is the
        mean of the others.
    """

    def mean(of: Callable[[Mapping[str, float]], float], parts: Sequence = parts) -> float:
        whole = math.fsum(share for _, share, _ in parts)
        return math.fsum(share * of(figures) for _, share, figures in parts) / whole

    keys = dict.fromkeys(key for _, _, figures in parts for key in figures)
    means = [key for key in keys if key.startswith("val_") and key != "val_bpb"]
    found = {key: mean(itemgetter(key), [part for part in parts if key in part[2]]) for key in means}
    found["perplexity"] = exp(found["val_loss"])
    if "bytes" in parts[0][2]:
        bytes_per_token = mean(lambda figures: figures["bytes"] / figures["tokens"])
        found["val_bpb"] = found["val_loss"] / math.log(2) / bytes_per_token if bytes_per_token else math.inf
    by_source = {
        f"{key}/{name}": figures[key] for name, _, figures in parts for key in ("val_loss", "val_bpb") if key in figures
    }
    return found | by_source


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is in the mode it was in.

    What FSDP2 gathered and would keep for a backward pass is let go: none comes, and the next step changes the weights.

    Not torch.inference_mode: a tensor made there (a weight that FSDP2 gathered, something a compiled region kept) could
    not be used in training afterwards.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
            if hasattr(module, "reshard"):
                module.reshard()


def token_byte_lengths(tokenizer: Tokenizer) -> Tensor:
    """(V,) int64: how many bytes of text each token stands for; 0 for special tokens."""
    return torch.tensor([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])


def exp(value: float) -> float:
    """e to the value, infinite where no float holds it."""
    return math.exp(value) if value < 700 else math.inf
