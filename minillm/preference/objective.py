"""The objective over preferences: log-probabilities of answers, summed a branch of each document, into a loss.

A document is a prompt with answers as its branches (data/rows.py): 1 chosen, or desirable; 2 rejected, or undesirable;
3 the answer to another prompt, by which KTO measures how far the policy has moved. Rows are packed with whole
documents.

Some things are known only of the whole batch, all micro-batches of all ranks: the KL of KTO, by how many tokens the
loss on the chosen answers is to be divided, and how many answers of either kind there are. `prepare` finds them out
before the first forward.

Shapes: B batch, T time, N documents (B * T places for them, of which most are empty).
"""

import copy
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minillm.data.batch import Batch
from minillm.data.trees import CHOSEN, MISMATCHED, REJECTED
from minillm.losses import IGNORE_INDEX, LOSSES
from minillm.model.masks import number_documents
from minillm.objectives import Metrics
from minillm.preference.reference import Reference, looking, target_logprobs

BRANCHES = 4  # the prompt, 0, and these
MULTIPLE = 16  # rows are cut to a multiple of so many tokens, which hardware likes, and there are fewer shapes


class Whole(NamedTuple):
    """What is known of the whole batch."""

    units_per_token: Tensor | float  # pairs, or answers, by tokens of chosen answers
    answers: Tensor  # (2,): how many are chosen, or desirable, and how many rejected
    kl: Tensor | None  # where the loss asks for it


class Preference:
    """Prefer the chosen answer to the rejected one: the unit is a pair, or an answer where the loss takes no pairs.

    Args:
        loss: a name in `LOSSES`, where the usual `beta` and `sft_weight` stand, and what `options` it takes.
        reference: what the policy is compared with; none for losses without one.
        sft_weight: of -log p of the chosen answers, a token on average, which joins what is minimised, and not the
            loss that is reported.
        vocab_size, chunk_tokens: as in `chunked_losses`.

    Metrics: means over pairs of the log-probabilities of both answers under both models, of their rewards, the margin
    between those, and their lengths in tokens; the share of pairs in which the chosen one has the greater reward
    (`preference_accuracy`), and in which it is the likelier to the policy alone (`ranking_accuracy`), a tie being
    half. `kl`: a token, how far the policy has moved from the reference on these answers (see `divergence`).

    Where the loss takes no pairs, they are means over the answers of each kind, and the margin is the difference of
    these; the share is that of answers that `told_apart` finds (`label_accuracy`); `kto_kl` is the KL of KTO's formula,
    an answer.
    """

    def __init__(
        self,
        loss: str = "dpo",
        reference: Reference | None = None,
        *,
        beta: float | None = None,
        sft_weight: float | None = None,
        vocab_size: int | None = None,
        chunk_tokens: int | None = None,
        **options: float,
    ):
        if loss not in LOSSES:
            raise ValueError(f"loss: {loss!r} is not known ({', '.join(LOSSES)})")
        self.loss = LOSSES[loss]
        if unknown := sorted(options.keys() - self.loss.options.keys()):
            takes = ", ".join(("beta", *self.loss.options))
            raise ValueError(f"{unknown[0]}: has no effect on the loss {loss}, which takes {takes}")
        if self.loss.reference != (reference is not None):
            needs = "compares with a reference; give one" if self.loss.reference else "has no reference; leave it out"
            raise ValueError(f"reference: the loss {loss} {needs}")
        self.reference = reference
        self.options = {"beta": self.loss.beta if beta is None else beta, **self.loss.options, **options}
        self.sft_weight = self.loss.sft_weight if sft_weight is None else sft_weight
        self.head = {"vocab_size": vocab_size, "chunk_tokens": chunk_tokens}
        self.whole: Whole | None = None  # None: a batch is looked at as if it were all there is

    def count(self, batch: Batch) -> int:
        """How many pairs, or answers, the batch has."""
        return int(self.units(lengths(batch)).sum())

    def prepare(
        self, model: nn.Module, micro_batches: Iterable[Batch], sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> "Preference":
        """The objective that knows what the micro-batches of a step, or a set, add up to; these are this rank's."""
        device, counts, ratios, kl = next(model.parameters()).device, [], [], None
        with looking(model):
            for batch in micro_batches:
                length = lengths(batch)  # on the host, where batches are still
                of_either_kind = answered(length).sum(0)  # (2,)
                counts.append(torch.stack([self.units(length).sum(), length[:, CHOSEN].sum(), *of_either_kind]))
                if not self.loss.paired:
                    ratios.append(self.mismatched_ratios(model, batch.to(device)))
        units, chosen_tokens, *answers = sum_over_ranks(torch.stack(counts).sum(0)).tolist()
        if not self.loss.paired:
            kl = mean_kl(sum_over_ranks(torch.stack(ratios).sum(0)))
        prepared = copy.copy(self)
        prepared.whole = Whole(units / max(1, chosen_tokens), torch.tensor(answers, device=device), kl)
        return prepared

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """The sum of what is minimised, and the metrics."""
        others = batch.branches == MISMATCHED
        answers = only(batch, ~others) if self.loss.paired else without(batch, others)
        reference = None if self.reference is None else self.reference(model, answers)  # (B, T), before any graph
        whole = self.whole or self.alone(model, batch)
        policy = target_logprobs(model, answers, **self.head)  # (B, T)
        length = lengths(answers).to(policy.dtype)  # (N, BRANCHES)
        ours = by_branch(answers, policy)  # (N, BRANCHES)
        theirs = None if reference is None else by_branch(answers, reference.to(policy.dtype))

        present = self.units(length)  # (N,), or (N, 2) of answers
        losses, rewards = self.losses(ours, theirs, length, whole)  # each like present; (N, 2)
        loss_sum = (losses * present).sum()
        metrics: Metrics = {"loss": (loss_sum.detach(), present.sum())}
        if self.sft_weight:
            sft_loss = -ours[:, CHOSEN].sum()
            metrics["sft_loss"] = (sft_loss.detach(), length[:, CHOSEN].sum())
            # so that the trainer, which divides by units, divides this by tokens
            loss_sum = loss_sum + self.sft_weight * whole.units_per_token * sft_loss
        metrics |= self.figures(ours.detach(), theirs, rewards, length, whole)
        if theirs is not None:
            learned = answers.targets != IGNORE_INDEX
            metrics["kl"] = divergence(policy.detach(), reference).where(learned, 0).sum(), learned.sum()
        if whole.kl is not None:
            metrics["kto_kl"] = whole.kl, 1
        return loss_sum, metrics

    # --- parts --------------------------------------------------------------------------------------------------------

    def units(self, length: Tensor) -> Tensor:
        """Which documents have a pair, (N,), or which have which answer, (N, 2), of what has these lengths."""
        return answered(length).all(1) if self.loss.paired else answered(length)

    def losses(self, ours: Tensor, theirs: Tensor | None, length: Tensor, whole: Whole) -> tuple[Tensor, Tensor]:
        """(losses, rewards): one loss a unit, rewards (N, 2) of the answers; what is not there has some numbers too."""

        def of_answers(sums: Tensor) -> Tensor:
            found = sums / length.clamp(min=1) if self.loss.mean else sums
            # -1 where there is none: a log-probability, from which no loss is infinite, unlike 0
            return found.where(length > 0, -1.0)[:, CHOSEN : REJECTED + 1]  # (N, 2)

        models = [of_answers(sums) for sums in (ours, theirs) if sums is not None]
        if self.loss.paired:
            vectors = [vector for answers in models for vector in answers.unbind(1)]  # policy first, chosen first
            losses, *rewards = self.loss.function(*vectors, **self.options)
            return losses, torch.stack(rewards, 1)
        desirable = (torch.arange(2, device=ours.device) == 0).expand(len(ours), 2)
        return self.loss.function(*models, desirable, whole.kl.to(ours.dtype), **self.options)

    def figures(self, ours: Tensor, theirs: Tensor | None, rewards: Tensor, length: Tensor, whole: Whole) -> Metrics:
        """What is logged of the answers, without gradients."""
        present = self.units(length)  # (N,) or (N, 2)
        each = present[:, None].expand(-1, 2) if self.loss.paired else present
        values = {"logprobs": ours, "reference_logprobs": theirs, "length": length}
        columns = {name: value[:, CHOSEN : REJECTED + 1] for name, value in values.items() if value is not None}
        metrics: Metrics = {}
        for name, column in (columns | {"rewards": rewards}).items():
            sums, counts = column.where(each, 0).sum(0), each.sum(0)  # (2,)
            metrics |= {f"{name}_chosen": (sums[0], counts[0]), f"{name}_rejected": (sums[1], counts[1])}
        if self.loss.paired:
            margin = rewards[:, 0] - rewards[:, 1]
            right = (1 + margin.sign()) / 2  # a tie, as all are before the first step, is a guess
            metrics["margin"] = (margin.where(present, 0).sum(), present.sum())
            metrics["preference_accuracy"] = (right.where(present, 0).sum(), present.sum())
            sums = ours / length.clamp(min=1) if self.loss.mean else ours
            likelier = (1 + (sums[:, CHOSEN] - sums[:, REJECTED]).sign()) / 2
            metrics["ranking_accuracy"] = (likelier.where(present, 0).sum(), present.sum())
            return metrics
        right = told_apart(rewards, self.options["beta"] * whole.kl)
        metrics["label_accuracy"] = (right.where(present, 0).sum(), present.sum())
        # so that divided by all answers of the whole batch it is the difference of the means of both kinds
        parts = rewards.where(present, 0).sum(0) * whole.answers.sum() / whole.answers.clamp(min=1)  # (2,)
        metrics["margin"] = (parts[0] - parts[1], present.sum() * whole.answers.all())
        return metrics

    def alone(self, model: nn.Module, batch: Batch) -> Whole:
        """What `prepare` finds out, of one batch."""
        length = lengths(batch)
        kl = None
        if not self.loss.paired:
            with looking(model):
                kl = mean_kl(self.mismatched_ratios(model, batch))
        units_per_token = self.units(length).sum() / length[:, CHOSEN].sum().clamp(min=1)
        return Whole(units_per_token, answered(length).sum(0), kl)

    def mismatched_ratios(self, model: nn.Module, batch: Batch) -> Tensor:
        """(2,): the sum of log(policy / reference) over the answers to other prompts, and their number."""
        others = without(batch, (batch.branches == CHOSEN) | (batch.branches == REJECTED))
        policy, reference = target_logprobs(model, others, **self.head), self.reference(model, others)  # (B, T)
        ratios = by_branch(others, policy - reference.to(policy.dtype))[:, MISMATCHED]
        return torch.stack([ratios.sum(), (lengths(others)[:, MISMATCHED] > 0).sum().to(ratios.dtype)])


def answered(length: Tensor) -> Tensor:
    """Which documents have a chosen answer, and which a rejected one: (N, 2), of what has these lengths."""
    return length[:, CHOSEN : REJECTED + 1] > 0


def told_apart(rewards: Tensor, point: Tensor) -> Tensor:
    """1 where a reward is on the side of a point that its label says, 0 where on the other, a half where at it: (N, 2).

    KTO counts gains and losses from that point: desirable answers, the first column, are to be above it.
    """
    return (1 + (rewards - point).sign() * rewards.new_tensor([1.0, -1.0])) / 2


def mean_kl(ratios: Tensor) -> Tensor:
    """The KL of KTO, never negative, of (a sum of log ratios, their number)."""
    total, count = ratios
    return (total / count.clamp(min=1)).clamp(min=0)


def divergence(policy: Tensor, reference: Tensor) -> Tensor:
    """How far a policy has moved from a reference, a token: half the square of the log ratio of their probabilities.

    Its mean is near the KL between them, in either direction, as long as they are near, for answers that one of them
    would give. Far apart it is large, but not decided by one token alone, as are estimates without a bias.
    Source: the estimator k2 of Schulman 2020, Approximating KL divergence.
    """
    return (policy - reference.to(policy.dtype)).square() / 2


def only(batch: Batch, kept: Tensor) -> Batch:
    """The batch with targets in some of its places alone."""
    return batch._replace(targets=batch.targets.where(kept, IGNORE_INDEX))


def without(batch: Batch, dropped: Tensor) -> Batch:
    """The batch without some of its tokens: the others move to the left, and rows end where the longest does.

    Padding goes too. What is left has the documents that it had, if under other numbers.
    """
    T = batch.tokens.shape[1]
    dropped = dropped | ~(lengths(batch) > 0).any(1)[document_numbers(batch)]  # (B, T)
    longest = int((~dropped).sum(1).max())
    T = min(T, max(1, -(-longest // MULTIPLE) * MULTIPLE))
    places = dropped.to(torch.uint8).argsort(dim=1, stable=True)[:, :T]  # (B, T): what is kept comes first, in order
    left = Batch(*(None if field is None else field.gather(1, places) for field in batch))
    left = left._replace(doc_ids=number_documents(left.doc_ids))
    return only(left, ~dropped.gather(1, places))


def document_numbers(batch: Batch) -> Tensor:
    """The documents of all rows, each with a number below B * T: (B, T)"""
    B, T = batch.tokens.shape
    return torch.arange(B, device=batch.tokens.device)[:, None] * T + batch.doc_ids


def lengths(batch: Batch) -> Tensor:
    """How many tokens are learned in each branch of each document: (N, BRANCHES) int64.

    Raises ValueError for rows that are no preferences.
    """
    if batch.branches is None:
        raise ValueError("the rows have no branches: this objective learns from preferences alone")
    return by_branch(batch, torch.ones_like(batch.targets))


def by_branch(batch: Batch, values: Tensor) -> Tensor:
    """Sums over the places that have a target: (B, T) -> (N, BRANCHES)."""
    places = document_numbers(batch) * BRANCHES + batch.branches  # (B, T)
    learned = values.where(batch.targets != IGNORE_INDEX, 0)
    sums = values.new_zeros(values.numel() * BRANCHES).index_add(0, places.flatten(), learned.flatten())
    return sums.view(-1, BRANCHES)
