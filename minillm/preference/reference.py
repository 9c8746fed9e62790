"""What a policy is compared with: a model that does not change, as the log-probabilities that it gives to targets.

    Frozen            a model of its own: any
    WithoutAdapters   the policy without its adapters: no second model, where they began at nothing
    Kept              the policy as it was: copies of what is trained, put in its place for a forward; adapters that
                      went on from earlier ones, and modules that are trained in full beside them
    cached            numbers that were computed before training (cache.py): no second model, no second forward

All but the last are made of a model that stands where the run began, before a checkpoint is resumed. None of them drops
anything out, and what they give has no gradient.

Shapes: B batch, T time.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from minillm.data.batch import Batch
from minillm.lora import base_parameters, disabled
from minillm.losses import token_logprobs
from minillm.tensors import local_part, parameter_names, unwrapped

Reference = Callable[[nn.Module, Batch], Tensor]  # (the policy, a batch) -> log p of each target, (B, T)


def target_logprobs(
    model: nn.Module, batch: Batch, vocab_size: int | None = None, chunk_tokens: int | None = None
) -> Tensor:
    """log p of each target in nats, (B, T); 0 where there is none. Arguments as in `chunked_losses`."""
    # prompts are no targets: to leave them out is worth waiting for their number
    head = partial(
        token_logprobs, targets=batch.targets, vocab_size=vocab_size, chunk_tokens=chunk_tokens, skip_ignored=True
    )
    fields = {"positions": batch.positions, "doc_ids": batch.doc_ids, "branches": batch.branches}
    return model(batch.tokens, **fields, head=head)


class Frozen:
    """A model that is nothing but a reference; it is given up for that."""

    def __init__(self, model: nn.Module, vocab_size: int | None = None):
        self.model, self.vocab_size = model.requires_grad_(False).eval(), vocab_size
        self.hash = fingerprint(parameter_names(model))

    def __call__(self, policy: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            return target_logprobs(self.model, batch, self.vocab_size)

    def check(self) -> None:
        """Raises RuntimeError where a weight has changed."""
        refuse_change(self.hash, parameter_names(self.model))


class WithoutAdapters:
    """A policy's base, which its adapters leave as it is.

    Raises ValueError where there are none, or where modules beside them are trained in full.
    """

    def __init__(self, policy: nn.Module, vocab_size: int | None = None):
        with disabled(unwrapped(policy)):  # raises here, not at the first step
            self.base, self.vocab_size = base_parameters(policy), vocab_size
        self.hash = fingerprint(self.base)

    def __call__(self, policy: nn.Module, batch: Batch) -> Tensor:
        with looking(policy), disabled(unwrapped(policy)):
            return target_logprobs(policy, batch, self.vocab_size)

    def check(self) -> None:
        """Raises RuntimeError where a weight has changed."""
        refuse_change(self.hash, self.base)


class Kept:
    """A policy as it is when this is made; copies of what is trained then take its place for the time of a forward.

    Under FSDP2 a rank copies the parts that it holds.
    """

    def __init__(self, policy: nn.Module, vocab_size: int | None = None):
        self.trained = {name: p for name, p in parameter_names(policy).items() if p.requires_grad}
        self.copies = {name: local_part(p.detach())[0].clone() for name, p in self.trained.items()}
        self.vocab_size, self.hash = vocab_size, fingerprint(self.copies)

    def __call__(self, policy: nn.Module, batch: Batch) -> Tensor:
        with looking(policy), self.in_place(policy):
            return target_logprobs(policy, batch, self.vocab_size)

    @contextmanager
    def in_place(self, policy: nn.Module) -> Iterator[None]:
        """Inside, the policy is what it was."""
        self.exchange(policy)
        try:
            yield
        finally:
            self.exchange(policy)

    @torch.no_grad()
    def exchange(self, policy: nn.Module) -> None:
        """Let copies and parameters change places, one after the other, so that little is held twice."""
        for module in policy.modules():
            if hasattr(module, "reshard"):  # FSDP2 would go on with what it has gathered
                module.reshard()
        for name, parameter in self.trained.items():
            here, kept = local_part(parameter.detach())[0], self.copies[name]
            held = here.clone()
            here.copy_(kept)
            kept.copy_(held)

    def check(self) -> None:
        """Raises RuntimeError where a copy has changed."""
        refuse_change(self.hash, self.copies)


def cached(policy: nn.Module, batch: Batch) -> Tensor:
    """What was computed before training. Raises ValueError where the batch has nothing of the kind."""
    if batch.reference is None:
        raise ValueError(
            "reference: the rows have no cached log-probabilities; `cache_reference` gives them to a store"
        )
    return batch.reference


# --- what they share --------------------------------------------------------------------------------------------------


@contextmanager
def looking(model: nn.Module) -> Iterator[None]:
    """Inside, there are no gradients, and nothing is dropped out; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of what this rank holds of some tensors, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        part = local_part(tensor.detach())[0].contiguous().cpu()
        digest.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
        digest.update(part.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def refuse_change(expected: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises RuntimeError where tensors are no longer what they were."""
    found = fingerprint(tensors)
    if found != expected:
        raise RuntimeError(
            f"the reference has changed while the policy was trained: its sha256 is {found[:12]}, was {expected[:12]}"
        )
