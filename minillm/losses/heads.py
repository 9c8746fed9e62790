"""Losses over a large vocabulary, computed a slice of tokens at a time so that the logits never exist as a whole.

Each function here is a *head*: it takes the model's `lm_head` and its last hidden state, and applies the projection
itself. A model calls it inside its forward, where DDP and FSDP2 have the weight ready:

    loss_sum = model(tokens, head=partial(chunked_cross_entropy, targets=targets, vocab_size=V))

How a chunk is computed, and its gradient with it, stands in chunks.py; what a rank computes of it where the head is
spread over tensor-parallel ranks, in shard.py. The losses are the same on all of them.

Shapes: B batch, T time, D dim, V vocab, N rows (B * T, or those that have a target).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minillm.losses.chunks import (
    IGNORE_INDEX,
    NO_PENALTIES,
    LinearCrossEntropy,
    LinearLogprobs,
    Losses,
    Penalties,
    Projection,
    matmul_dtype,
    summed_losses,
)
from minillm.losses.shard import local_head
from minillm.tensors import is_sharded

# With the vocabulary as small as a byte's, a chunk by bytes alone would sum a million rows in one half-precision
# product, which fp16 cannot hold.
MAX_CHUNK_TOKENS = 8192


def cross_entropy(lm_head: nn.Module, hidden: Tensor, targets: Tensor, vocab_size: int | None = None) -> Tensor:
    """The plain loss, for comparison and for small vocabularies: the sum of -log p(target) in nats over all targets.

    Args:
        hidden: (B, T, D), or any number of leading dimensions that `targets` shares.
        targets: (B, T) int64; IGNORE_INDEX where nothing is to be learned.
        vocab_size: rows of lm_head beyond it are padding and take no part.
    """
    return penalised_cross_entropy(lm_head, hidden, targets, vocab_size).total


def penalised_cross_entropy(
    lm_head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    vocab_size: int | None = None,
    penalties: Penalties = NO_PENALTIES,
) -> Losses:
    """`cross_entropy` with penalties, with all logits at once."""
    logits = lm_head(hidden)[..., :vocab_size]  # (B, T, V)
    logits = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))  # (B * T, V)
    options = {"target": targets.flatten(), "ignore_index": IGNORE_INDEX, "reduction": "sum"}
    total = plain = F.cross_entropy(logits, **options)
    z_loss = torch.zeros_like(plain)
    if penalties.label_smoothing:
        total = F.cross_entropy(logits, **options, label_smoothing=penalties.label_smoothing)
    if penalties.z_loss:
        log_z = logits.logsumexp(-1)[targets.flatten() != IGNORE_INDEX]
        z_loss = penalties.z_loss * log_z.square().sum()
        total = total + z_loss
    return Losses(total, plain.detach(), z_loss.detach())


def chunked_cross_entropy(
    lm_head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    skip_ignored: bool | None = None,
) -> Tensor:
    """`cross_entropy`, value and gradients, in bounded memory; arguments as in `chunked_losses`."""
    return chunked_losses(lm_head, hidden, targets, vocab_size, chunk_tokens, skip_ignored).total


def chunked_losses(
    lm_head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    skip_ignored: bool | None = None,
    penalties: Penalties = NO_PENALTIES,
) -> Losses:
    """`penalised_cross_entropy`, values and gradients, in memory bounded by a chunk of tokens.

    Args:
        chunk_tokens: tokens whose logits exist at once; by default as many as fit `logits_bytes`.
        skip_ignored: leave rows without a target out of the matrix products. That needs their number on the host: free
            on the CPU, where it is the default, and one synchronisation elsewhere, which pays where many rows are
            ignored (instruction data) and not where none is (pretraining).

    The total can be passed through backward once; a second time raises RuntimeError. Where lm_head is more than a
    plain nn.Linear (it carries an adapter, say), it is called on each chunk, and once more in backward.
    """
    vocab_size = vocab_size or lm_head.out_features
    rows, row_targets, _ = select_rows(hidden, targets, vocab_size, skip_ignored)
    if not is_plain_linear(lm_head):
        chunk_tokens = chunk_tokens or default_chunk_tokens(len(rows), vocab_size, hidden.device)
        arguments = vocab_size, penalties
        parts = [
            checkpoint(penalised_cross_entropy, lm_head, h, t, *arguments, use_reentrant=False)
            for h, t in zip(rows.split(chunk_tokens), row_targets.split(chunk_tokens))
        ]
        return Losses(*(torch.stack(each).sum() for each in zip(*parts)))
    weight, bias, shard = local_head(lm_head)
    chunk_tokens = chunk_tokens or default_chunk_tokens(len(rows), min(vocab_size, shard.rows), hidden.device)
    dtype = matmul_dtype(weight)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (rows, weight, bias)):
        options = shard, row_targets, vocab_size, chunk_tokens, dtype, penalties
        return Losses(*LinearCrossEntropy.apply(rows, weight, bias, *options))
    projection = Projection.of(weight, bias, vocab_size, dtype, shard)
    return summed_losses(rows, projection, row_targets, chunk_tokens, penalties)


def token_logprobs(
    lm_head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    skip_ignored: bool | None = None,
) -> Tensor:
    """log p(target) of every token in nats, (B, T), 0 where the target is ignored; chunked like the loss.

    Arguments as in `chunked_cross_entropy`. What comes after it may weigh tokens differently, so backward cannot know
    the gradient before: it makes each chunk's logits a second time.
    """
    vocab_size = vocab_size or lm_head.out_features
    rows, row_targets, index = select_rows(hidden, targets, vocab_size, skip_ignored)
    if is_plain_linear(lm_head):
        weight, bias, shard = local_head(lm_head)
        chunk_tokens = chunk_tokens or default_chunk_tokens(len(rows), min(vocab_size, shard.rows), hidden.device)
        dtype = matmul_dtype(weight)
        logprobs = LinearLogprobs.apply(rows, weight, bias, shard, row_targets, vocab_size, chunk_tokens, dtype)
    else:
        chunk_tokens = chunk_tokens or default_chunk_tokens(len(rows), vocab_size, hidden.device)
        parts = zip(rows.split(chunk_tokens), row_targets.split(chunk_tokens))
        logprobs = torch.cat(
            [checkpoint(plain_logprobs, lm_head, h, t, vocab_size, use_reentrant=False) for h, t in parts]
        )
    if index is not None:
        logprobs = logprobs.new_zeros(targets.numel()).index_copy(0, index, logprobs)  # (N,) -> (B * T,)
    return logprobs.view(targets.shape).clone()  # of a view that leaves a model, FSDP2 warns


def loss_and_hits(
    lm_head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    skip_ignored: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """(the summed loss, how many targets are the most likely token), for evaluation: chunked, without gradients.

    Arguments as in `chunked_cross_entropy`. Of tokens equally likely the first is taken, as a greedy choice does.
    """
    vocab_size = vocab_size or lm_head.out_features
    rows, row_targets, _ = select_rows(hidden, targets, vocab_size, skip_ignored)
    chunk_tokens = chunk_tokens or default_chunk_tokens(len(rows), vocab_size, hidden.device)
    losses, hits = [rows.new_zeros(())], [row_targets.new_zeros(())]
    with torch.no_grad():
        for h, t in zip(rows.split(chunk_tokens), row_targets.split(chunk_tokens)):
            logits = lm_head(h)[:, :vocab_size]  # (C, V)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses.append(F.cross_entropy(logits, t, ignore_index=IGNORE_INDEX, reduction="sum"))
            hits.append((logits.argmax(-1) == t).sum())
    return sum(losses), sum(hits)


def plain_logprobs(lm_head: nn.Module, hidden: Tensor, targets: Tensor, vocab_size: int | None = None) -> Tensor:
    """log p(target) with all logits at once, (N, D) -> (N,); 0 where the target is ignored."""
    logits = lm_head(hidden)[..., :vocab_size]  # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")


# --- rows -----------------------------------------------------------------------------------------------------------


def is_plain_linear(lm_head: nn.Module) -> bool:
    """Whether calling lm_head is exactly x W^T + b, so that its weight may be used directly.

    The hooks of a head that is spread over ranks gather what each makes of its rows: still x W^T + b.
    """
    if not isinstance(lm_head, nn.Linear) or type(lm_head).forward is not nn.Linear.forward:
        return False
    return is_sharded(lm_head.weight) or not (lm_head._forward_hooks or lm_head._forward_pre_hooks)


def on_host(tensor: Tensor) -> bool:
    """Whether reading a value of the tensor makes nobody wait."""
    return tensor.device.type == "cpu"


def logits_bytes(device: torch.device) -> int:
    """How large a chunk's logits may be by default.

    On a CPU 128 MiB: 220 tokens at V = 151,936, 667 at 50,304. Larger chunks were hardly faster there; smaller ones
    were, for a large vocabulary, much slower, because each one reads and writes the whole (V, D) gradient. An
    accelerator computes more per byte it moves, so its chunks are larger.
    """
    return 128 * 2**20 if device.type == "cpu" else 512 * 2**20


def default_chunk_tokens(n_rows: int, vocab_size: int, device: torch.device) -> int:
    """The largest equal split of the rows whose fp32 logits stay within `logits_bytes`."""
    most = max(1, min(logits_bytes(device) // (4 * vocab_size), MAX_CHUNK_TOKENS))
    n_chunks = max(1, -(-n_rows // most))
    return max(1, -(-n_rows // n_chunks))


def select_rows(
    hidden: Tensor, targets: Tensor, vocab_size: int, skip_ignored: bool | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Flatten to rows, (B, T, D) -> (N, D), without the ignored ones where asked: (rows, targets, index or None)."""
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}; the hidden state needs {tuple(hidden.shape[:-1])}"
        )
    rows, row_targets, index = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), None
    if skip_ignored or (skip_ignored is None and on_host(targets)):
        index = (row_targets != IGNORE_INDEX).nonzero()[:, 0]  # (N,)
        if len(index) == len(row_targets):
            index = None
        else:
            rows, row_targets = rows[index], row_targets[index]
    if on_host(targets) and len(row_targets):  # elsewhere the kernels check bounds themselves
        least, most = row_targets.aminmax()
        if least < 0 or most >= vocab_size:
            check_targets(targets, vocab_size)
    return rows, row_targets, index


def check_targets(targets: Tensor, vocab_size: int) -> None:
    """Raises ValueError naming the first target that is neither a token nor IGNORE_INDEX."""
    wrong = ((targets < 0) & (targets != IGNORE_INDEX)) | (targets >= vocab_size)
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"target {targets[place]} at {place} is not a token: 0 to {vocab_size - 1} are, "
            f"and {IGNORE_INDEX} stands for none"
        )
