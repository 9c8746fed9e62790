"""Losses over preferences, as functions of log-probabilities: one loss a pair, or one an answer.

A response's log-probability is the sum over its tokens, in nats, or their mean, as `LOSSES` says of each loss. All
arguments and results are vectors with one entry a pair (or an answer). Gradients pass through the policy alone; the
rewards carry none. What they share: a reward r of a response, and h, that of the chosen one less that of the rejected.

    dpo     -log sigmoid(h)                        r = beta * (policy - reference), by sums
    hinge   max(0, 1 - h)                          the same r
    ipo     (h / beta - 1 / (2 beta))^2            the same r, by means
    kto     1 - sigmoid(+-(r - beta * KL))         the same r, by sums; no pairs: + where desirable, - where not
    orpo    -beta * log sigmoid(log of the ratio of odds)       no reference, by means; beside a loss on the chosen one
    simpo   -log sigmoid(h - gamma)                r = beta * policy: no reference, by means
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PairLosses = tuple[Tensor, Tensor, Tensor]  # losses, rewards of the chosen responses, of the rejected ones


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> PairLosses:
    """Direct preference optimisation, one loss a pair: -log sigmoid(h).

    Args: summed log-probabilities of each response under each model, shape (pairs,), in nats. `label_smoothing`: how
        often a pair is believed to be the wrong way round; above 0 this is conservative DPO.
    Returns: (losses, chosen_rewards, rejected_rewards), each (pairs,); a reward is beta * (policy - reference).
    Source: Rafailov et al. 2023 (arXiv:2305.18290), eq. 7; with label_smoothing e, -(1 - e) log sigmoid(h) -
        e log sigmoid(-h): Mitchell 2023, A note on DPO with noisy preferences, eq. 3.
    """
    chosen, rejected = beta * (policy_chosen - reference_chosen), beta * (policy_rejected - reference_rejected)
    margin = chosen - rejected
    losses = -F.logsigmoid(margin)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-margin)
    return losses, chosen.detach(), rejected.detach()


def hinge_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
) -> PairLosses:
    """The hinge on the same margin, one loss a pair: max(0, 1 - h); a pair that is 1 apart teaches nothing more.

    Arguments and rewards as in `dpo_loss`.
    Source: Liu et al. 2023 (arXiv:2309.06657), the loss "hinge-norm", after SLiC of Zhao et al. 2023
        (arXiv:2305.10425), which has no reference.
    """
    chosen, rejected = beta * (policy_chosen - reference_chosen), beta * (policy_rejected - reference_rejected)
    return torch.relu(1 - (chosen - rejected)), chosen.detach(), rejected.detach()


def ipo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
) -> PairLosses:
    """Identity preference optimisation, one loss a pair: (log ratio - 1 / (2 beta))^2: too wide a margin costs, too.

    Arguments and rewards as in `dpo_loss`, but for means over the tokens of a response: the square of a sum would grow
    with its length. The paper leaves that open; by TRL's account its authors took means.
    Source: Azar et al. 2023 (arXiv:2310.12036), eq. 17, where beta is called tau.
    """
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    losses = (chosen - rejected - 1 / (2 * beta)).square()
    return losses, (beta * chosen).detach(), (beta * rejected).detach()


def kto_loss(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    kl: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Kahneman-Tversky optimisation, one loss an answer: weight * (1 - sigmoid(+-beta * (log ratio - KL))).

    Args: summed log-probabilities of each answer under each model, (answers,); which answers are desirable, (answers,)
        bool; `kl`, never negative: the mean over the whole batch of the log ratio of answers to other prompts.
    Returns: (losses, rewards), each (answers,).
    Source: Ethayarajh et al. 2024 (arXiv:2402.01306), eq. 7, and z0 below it.
    """
    ratio = policy - reference
    sign = torch.ones_like(ratio).where(desirable, -1.0)
    weight = torch.full_like(ratio, desirable_weight).where(desirable, undesirable_weight)
    return weight * torch.sigmoid(-sign * beta * (ratio - kl)), (beta * ratio).detach()


def orpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, beta: float = 0.1) -> PairLosses:
    """Odds-ratio preference optimisation, one loss a pair: -beta * log sigmoid(log odds(chosen) - log odds(rejected)).

    The odds of P are P / (1 - P), where log P is the mean log-probability of a response's tokens. It is a part of
    what the paper minimises; the other is -log P of the chosen answer, the SFT term.

    Args: mean log-probabilities a token of each response, shape (pairs,).
    Returns: (losses, chosen_rewards, rejected_rewards), each (pairs,); a reward is beta * policy.
    Source: Hong et al. 2024 (arXiv:2403.07691), eqs. 6 and 7, where beta is called lambda.
    """
    log_odds_ratio = log_odds(policy_chosen) - log_odds(policy_rejected)
    return -beta * F.logsigmoid(log_odds_ratio), (beta * policy_chosen).detach(), (beta * policy_rejected).detach()


def simpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, beta: float = 2.0, gamma: float = 1.0) -> PairLosses:
    """Simple preference optimisation, one loss a pair: -log sigmoid(h - gamma), without a reference.

    Args: mean log-probabilities a token of each response, shape (pairs,); `gamma`: the margin that is asked for.
    Returns: (losses, chosen_rewards, rejected_rewards), each (pairs,); a reward is beta * policy.
    Source: Meng et al. 2024 (arXiv:2405.14734), eq. 6.
    """
    chosen, rejected = beta * policy_chosen, beta * policy_rejected
    return -F.logsigmoid(chosen - rejected - gamma), chosen.detach(), rejected.detach()


def log_odds(logprob: Tensor) -> Tensor:
    """log(P / (1 - P)) of a log P, exact near both ends; that of a P that rounds to 1 is large, not infinite."""
    logprob = logprob.clamp(max=-torch.finfo(logprob.dtype).tiny)
    # each form only gets what it is good for: what `where` leaves out would still send 0 * infinity back
    near_one = torch.log(-torch.expm1(logprob.clamp(min=-math.log(2))))
    near_zero = torch.log1p(-torch.exp(logprob.clamp(max=-math.log(2))))
    return logprob - torch.where(logprob > -math.log(2), near_one, near_zero)


class PreferenceLoss(NamedTuple):
    """A loss, and what it needs."""

    function: Callable[..., tuple[Tensor, ...]]
    paired: bool  # takes pairs; otherwise answers, each desirable or not, and a KL over the whole batch
    reference: bool  # compares with a reference
    mean: bool  # log-probabilities a token instead of their sums
    beta: float  # the usual one
    sft_weight: float  # of -log p of the chosen answer, a token, that is minimised beside it unless another is given
    options: Mapping[str, float] = MappingProxyType({})  # the other numbers that it takes, and the usual ones


# Losses that ask for a distance alone let both answers become unlikely, which an SFT term of this weight stops
# (docs/preferences.md has the figures). To ORPO it belongs; KTO looks at each answer by itself.
KEEPS_CHOSEN = 0.2

LOSSES = {
    "dpo": PreferenceLoss(dpo_loss, True, True, False, 0.1, KEEPS_CHOSEN, {"label_smoothing": 0.0}),
    "hinge": PreferenceLoss(hinge_loss, True, True, False, 0.1, KEEPS_CHOSEN),
    "ipo": PreferenceLoss(ipo_loss, True, True, True, 0.1, KEEPS_CHOSEN),
    "kto": PreferenceLoss(kto_loss, False, True, False, 0.1, 0.0, {"desirable_weight": 1.0, "undesirable_weight": 1.0}),
    "orpo": PreferenceLoss(orpo_loss, True, False, True, 0.1, 1.0),
    "simpo": PreferenceLoss(simpo_loss, True, False, True, 2.0, KEEPS_CHOSEN, {"gamma": 1.0}),
}
