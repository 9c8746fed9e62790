"""The `optim` section: what happens to the weights at each step."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

OptimizerName = Literal["adamw", "muon", "lamb", "adam", "adamax", "nadam", "adagrad", "adadelta", "rmsprop", "sgd"]
MOMENTUM = {"sgd": 0.9, "rmsprop": 0.0, "muon": 0.95}  # of those that have it, where none is given


@dataclass(frozen=True)
class OptimConfig:
    """What happens to the weights at each step."""

    name: Annotated[
        OptimizerName, "optimizer; muon: Muon for the blocks' matrices, AdamW for the rest; others as in torch.optim"
    ] = "adamw"
    lr: Annotated[float | None, "peak learning rate; none: chosen for the size of the corpus", "> 0"] = None
    min_lr: Annotated[float, "learning rate of the last step", ">= 0"] = 0.0
    warmup_steps: Annotated[int | None, "steps of linear warm-up; none: chosen for the length of the run", ">= 0"] = (
        None
    )
    warmup_ratio: Annotated[float | None, "instead of warmup_steps: the share of all steps", ">= 0, < 1"] = None
    schedule: Annotated[
        Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"],
        "from lr to min_lr; wsd stays at lr, then decays at the end; inverse_sqrt falls for ever",
    ] = "cosine"
    decay_fraction: Annotated[float, "part of the run in which wsd decays", "> 0, <= 1"] = 0.2
    weight_decay: Annotated[
        float, "pull of matrices towards 0: times lr for adamw, muon, lamb, a part of the gradient for others", ">= 0"
    ] = 0.1
    l1: Annotated[float, "pull of matrices towards 0, as large everywhere: a part of the gradient", ">= 0"] = 0.0
    beta1: Annotated[float, "Adam's family: memory of the gradient", ">= 0, < 1"] = 0.9
    beta2: Annotated[float, "Adam's family, rmsprop, adadelta: memory of the squared gradient", ">= 0, < 1"] = 0.95
    eps: Annotated[float, "added to the root of the squared gradient", "> 0"] = 1e-8
    momentum: Annotated[
        float | None, "sgd, rmsprop, muon: memory of the gradient; none: 0.9, 0 and 0.95", ">= 0, < 1"
    ] = None
    muon_lr: Annotated[float | None, "Muon: peak learning rate of its matrices; none: lr", "> 0"] = None
    lr_scales: Annotated[
        list[str], "PATTERN=FACTOR of lr for the parameters of those names, the first that fits: embed*=0.1,*norm*=0"
    ] = field(default_factory=list)
    grad_clip: Annotated[float | None, "limit on the norm of the whole gradient; none: no limit", "> 0"] = 1.0

    def __post_init__(self):
        problems = []
        if self.lr is not None and self.min_lr > self.lr:
            problems.append(f"min_lr: {self.min_lr:g} is above lr {self.lr:g}; the rate falls from lr to min_lr")
        if self.muon_lr is not None and self.name != "muon":
            problems.append(f"muon_lr: {self.muon_lr:g} has no effect with name {self.name}; set name muon, or lr")
        if self.momentum is not None and self.name not in MOMENTUM:
            names = ", ".join(MOMENTUM)
            problems.append(f"momentum: {self.momentum:g} has no effect with name {self.name}; only {names} have one")
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            problems.append("warmup_ratio: warmup_steps is given too; give one of them")
        try:
            self.scales()
        except ValueError as error:
            problems.append(f"lr_scales: {error}")
        if problems:
            raise ValueError("\n".join(problems))

    def scales(self) -> list[tuple[str, float]]:
        """`lr_scales` read: (pattern, factor) each."""
        found = []
        for item in self.lr_scales:
            pattern, _, factor = item.rpartition("=")
            try:
                scale = float(factor)
            except ValueError:
                scale = -1.0
            if not pattern or not 0 <= scale < float("inf"):
                raise ValueError(f"{item!r}: a pattern of names, = and a number of 0 or more are expected: embed*=0.1")
            found.append((pattern, scale))
        return found


def chosen(config: OptimConfig, field: str) -> Any:
    """A field that may be left open until the corpus is known, now that it is needed."""
    value = getattr(config, field)
    if value is None:
        raise ValueError(f"{field}: none is chosen yet; give a number")
    return value
