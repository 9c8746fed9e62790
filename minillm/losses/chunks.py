"""The loss and its gradients, a chunk of rows after the other.

How it works. Write h for a row of the hidden state, W for the weight, p = softmax(W h), and t for the row's target. The
loss is -log p[t], and its gradients are (p - onehot(t)) W with respect to h and (p - onehot(t)) h^T with respect to W.
Both need p, and none needs anything that comes after the loss, because a sum passes one number back: the scale. So
forward makes the gradients at once, a chunk of rows after the other in one reused buffer, and backward multiplies them
by that number. Nothing is computed twice: three matrix products, as without chunks.

What is in memory: two chunk buffers under half precision and one otherwise, each of at most `logits_bytes(device)`
unless `chunk_tokens` says otherwise, and the gradients themselves, which backward would have to make anyway.

Precision: the matrix products run in the autocast dtype where there is one, softmax and the sum over chunks in fp32
(in float64 for float64 weights).

Two penalties may join the loss: label smoothing asks for a little of every token, s times the mean over the vocabulary
of -log p (Szegedy et al. 2016, section 7), leaving 1 - s of the loss itself; z-loss keeps the normaliser Z = sum(exp(W
h)) near 1, by z (log Z)^2 (Chowdhery et al. 2022, section 5). They change what is minimised and not what is reported:
the plain loss comes along. With both, the gradient with respect to the logits is (1 + 2 z log Z) p - (1 - s) onehot(t)
- s / V.

Where the rows of W are spread over tensor-parallel ranks (shard.py), each computes its part of the logits and of the
gradient with respect to W; the largest logit, the sums and the gradient with respect to h are reduced over the ranks.

Shapes: B batch, T time, D dim, V vocab (of this rank), N rows (B * T, or those that have a target), C rows of a chunk.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minillm.losses.shard import VocabShard

IGNORE_INDEX = -100


class Penalties(NamedTuple):
    """What is minimised beside -log p(target); both 0: nothing."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0


class Losses(NamedTuple):
    """Sums over all targets: what is minimised, and, without gradients, the plain loss and the z-loss in it."""

    total: Tensor
    cross_entropy: Tensor
    z_loss: Tensor


NO_PENALTIES = Penalties()


def matmul_dtype(weight: Tensor) -> torch.dtype:
    """What a projection by this weight is computed in: the dtype of autocast, where it is on and applies."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


class Projection(NamedTuple):
    """What a chunk's logits are made with."""

    weight: Tensor  # (V, D) without padding rows, in the dtype of the matrix products
    bias: Tensor | None  # (V,)
    accumulate_dtype: torch.dtype  # of the softmax, the loss and the sums over chunks
    vocab_size: int  # over all ranks
    shard: VocabShard

    @classmethod
    def of(
        cls, weight: Tensor, bias: Tensor | None, vocab_size: int, dtype: torch.dtype, shard: VocabShard
    ) -> "Projection":
        here = vocab_size - shard.first
        bias = None if bias is None else bias[:here]
        return cls(weight[:here].to(dtype), bias, torch.promote_types(dtype, torch.float32), vocab_size, shard)


class Chunk(NamedTuple):
    """Some rows on their way: `exps` / `sums` is the softmax. The next chunk overwrites the (C, V) buffers."""

    place: slice
    rows: Tensor  # (C, D), in the dtype of the matrix products
    targets: Tensor  # (C, 1), the target's column, 0 where there is none here
    found: Tensor  # (C, 1), 1.0 where there is one, 0.0 where the target is ignored or another rank's
    trained: Tensor  # (C, 1), 1.0 where there is a target, 0.0 where it is ignored
    exps: Tensor  # (C, V), exp(logit - the row's largest)
    sums: Tensor  # (C, 1), of exps, over all ranks
    nll: Tensor  # (C,), -log p(target), 0 where ignored
    log_z: Tensor  # (C, 1), of the sum of exp(logit)
    uniform: Tensor | None  # (C, 1), mean of -log p over the vocabulary, where it is asked for
    product: Tensor  # (C, V), a buffer in the dtype of the matrix products; the memory of exps where the dtypes agree


def softmax_chunks(
    rows: Tensor, projection: Projection, targets: Tensor, chunk_tokens: int, uniform: bool = False
) -> Iterator[Chunk]:
    """The softmax over the vocabulary, a chunk of rows after the other, in one buffer."""
    weight, bias, accumulate_dtype, vocab_size, shard = projection
    N, C, V = len(rows), min(len(rows), chunk_tokens), len(weight)
    products = rows.new_empty(C, V, dtype=weight.dtype)
    buffer = products if accumulate_dtype == weight.dtype else rows.new_empty(C, V, dtype=accumulate_dtype)
    for start in range(0, N, chunk_tokens):
        place = slice(start, min(start + chunk_tokens, N))
        chunk_rows = rows[place].to(weight.dtype)  # (C, D)
        product, logits = products[: len(chunk_rows)], buffer[: len(chunk_rows)]
        torch.mm(chunk_rows, weight.t(), out=product)  # (C, V)
        if logits.dtype != product.dtype:
            logits.copy_(product)
        if bias is not None:
            logits.add_(bias)
        chunk_targets = targets[place][:, None]  # (C, 1)
        trained = chunk_targets != IGNORE_INDEX
        found = trained & shard.holds(chunk_targets)
        chunk_targets = (chunk_targets - shard.first).where(found, 0)
        target_logits = logits.gather(1, chunk_targets).where(found, 0)
        logit_sums = logits.sum(1, keepdim=True) if uniform else torch.zeros_like(target_logits)
        largest = shard.max(logits.amax(1, keepdim=True))
        exps = logits.sub_(largest).exp_()
        sums = exps.sum(1, keepdim=True)
        sums, target_logits, logit_sums = shard.sum(torch.cat([sums, target_logits, logit_sums], 1)).split(1, dim=1)
        log_z = sums.log() + largest
        nll = (log_z - target_logits).where(trained, 0)[:, 0]
        mean = log_z - logit_sums / vocab_size if uniform else None
        found, trained = found.to(sums.dtype), trained.to(sums.dtype)
        yield Chunk(place, chunk_rows, chunk_targets, found, trained, exps, sums, nll, log_z, mean, product)


class Gradients:
    """Gradients of the rows (N, D), weight and bias, those that are needed, summed up chunk by chunk."""

    def __init__(self, rows: Tensor, weight: Tensor, bias: Tensor | None, projection: Projection, needed: list[bool]):
        self.projection, self.dtypes = projection, (weight.dtype, bias.dtype if bias is not None else None)
        V, dtype = len(projection.weight), projection.accumulate_dtype
        self.rows = torch.empty_like(rows) if needed[0] else None
        self.weight = torch.empty_like(weight, dtype=dtype) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=dtype) if needed[2] else None
        if self.weight is not None:
            # the first chunk, where there is one, writes all but the padding rows
            self.weight[V if len(rows) else 0 :].zero_()

    def add(self, chunk: Chunk, scale: Tensor, penalties: Penalties = NO_PENALTIES) -> None:
        """Add the gradient of sum(scale * nll), with penalties, over the chunk's rows; scale is (C, 1).

        Uses up `chunk.exps`.
        """
        V, label_smoothing = len(self.projection.weight), penalties.label_smoothing
        grad = chunk.exps  # d nll / d logits = exps / sums - onehot
        if penalties.z_loss:
            grad.mul_(1 + 2 * penalties.z_loss * chunk.log_z)
        onehot = (1 - label_smoothing) * chunk.sums * chunk.found
        grad.scatter_(1, chunk.targets, grad.gather(1, chunk.targets) - onehot)
        if label_smoothing:
            grad.sub_(label_smoothing / self.projection.vocab_size * chunk.sums)
        grad.mul_(scale * chunk.trained / chunk.sums)  # (C, V)
        if self.bias is not None:
            self.bias[:V] += grad.sum(0)
        exact = grad.dtype == chunk.product.dtype
        if not exact:
            grad = chunk.product.copy_(grad)
        if self.rows is not None and exact:
            torch.mm(grad, self.projection.weight, out=self.rows[chunk.place])  # (C, D)
        elif self.rows is not None:
            self.rows[chunk.place] = torch.mm(grad, self.projection.weight)
        if self.weight is not None:
            total, keep = self.weight[:V], 0 if chunk.place.start == 0 else 1
            if exact:
                total.addmm_(grad.t(), chunk.rows, beta=keep)  # (V, D)
            elif keep:
                total.add_(torch.mm(grad.t(), chunk.rows))
            else:
                total.copy_(torch.mm(grad.t(), chunk.rows))

    def finished(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients, each in the dtype of what it belongs to; that of the rows is the same on all ranks."""
        if self.rows is not None:
            self.projection.shard.sum(self.rows)
        weight = None if self.weight is None else self.weight.to(self.dtypes[0])
        bias = None if self.bias is None else self.bias.to(self.dtypes[1])
        return self.rows, weight, bias


def summed_losses(
    rows: Tensor,
    projection: Projection,
    targets: Tensor,
    chunk_tokens: int,
    penalties: Penalties,
    gradients: Gradients | None = None,
) -> Losses:
    """The losses over all chunks; `gradients`, where given, gets those of the total."""
    label_smoothing, z_loss = penalties
    nll = rows.new_empty(len(rows), dtype=projection.accumulate_dtype)
    uniform = z = nll.new_zeros(())
    for chunk in softmax_chunks(rows, projection, targets, chunk_tokens, label_smoothing > 0):
        nll[chunk.place] = chunk.nll
        if label_smoothing:
            uniform = uniform + (chunk.uniform * chunk.trained).sum()
        if z_loss:
            z = z + z_loss * (chunk.log_z.square() * chunk.trained).sum()
        if gradients is not None:
            gradients.add(chunk, torch.ones_like(chunk.sums), penalties)
    plain = nll.sum()
    return Losses((1 - label_smoothing) * plain + label_smoothing * uniform + z, plain, z)


class LinearCrossEntropy(torch.autograd.Function):
    """The summed losses; forward makes the gradients of their total for a scale of 1, backward scales them in place."""

    @staticmethod
    def forward(ctx, rows, weight, bias, shard, targets, vocab_size, chunk_tokens, dtype, penalties):
        projection = Projection.of(weight, bias, vocab_size, dtype, shard)
        gradients = Gradients(rows, weight, bias, projection, ctx.needs_input_grad[:3])
        losses = summed_losses(rows, projection, targets, chunk_tokens, penalties, gradients)
        ctx.gradients = gradients.finished()
        ctx.mark_non_differentiable(losses.cross_entropy, losses.z_loss)
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, scale, *_):
        if ctx.gradients is None:
            raise RuntimeError(
                "backward through chunked_cross_entropy a second time: its gradients were handed over the first time; "
                "call the model again, or use cross_entropy"
            )
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if gradient is None else gradient.mul_(scale) for gradient in gradients), *[None] * 6


class LinearLogprobs(torch.autograd.Function):
    """log p(target) of each row; backward makes the logits again, a chunk at a time."""

    @staticmethod
    def forward(ctx, rows, weight, bias, shard, targets, vocab_size, chunk_tokens, dtype):
        ctx.save_for_backward(rows, weight, bias, targets)
        ctx.settings = shard, vocab_size, chunk_tokens, dtype
        projection = Projection.of(weight, bias, vocab_size, dtype, shard)
        logprobs = rows.new_empty(len(rows), dtype=projection.accumulate_dtype)
        for chunk in softmax_chunks(rows, projection, targets, chunk_tokens):
            logprobs[chunk.place] = -chunk.nll
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, weight, bias, targets = ctx.saved_tensors
        shard, vocab_size, chunk_tokens, dtype = ctx.settings
        projection = Projection.of(weight, bias, vocab_size, dtype, shard)
        gradients = Gradients(rows, weight, bias, projection, ctx.needs_input_grad[:3])
        for chunk in softmax_chunks(rows, projection, targets, chunk_tokens):
            gradients.add(chunk, -grad[chunk.place][:, None])
        return *gradients.finished(), *[None] * 5
