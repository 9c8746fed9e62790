"""Each loss over preferences: the formula of its paper, written out in plain numbers, and its gradients."""

import inspect
import math
from functools import partial

import pytest
import torch

import minillm
from minillm.losses import LOSSES, dpo_loss, hinge_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss

# as sums over answers of different lengths, and as means over their tokens
SUMS = [
    [-12.5, -80.0, -3.25, -41.0],
    [-14.0, -71.5, -3.25, -66.0],
    [-13.0, -79.0, -9.5, -40.5],
    [-12.0, -75.0, -2.0, -60],
]
MEANS = [[-0.7, -2.5, -1e-4, -0.69], [-1.9, -2.4, -3.0, -0.7], [-0.8, -2.0, -0.3, -0.5], [-1.5, -2.6, -2.0, -0.9]]
DESIRABLE = [True, False, False, True]


def vectors(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def odds(p):
    return p / (1 - p)


# --- the formulas, as the papers print them ---------------------------------------------------------------------------


def dpo(c, r, ref_c, ref_r, beta):  # Rafailov et al. 2023, eq. 7
    return -math.log(sigmoid(beta * (c - ref_c) - beta * (r - ref_r)))


def conservative_dpo(c, r, ref_c, ref_r, beta, e):  # Mitchell 2023
    return (1 - e) * dpo(c, r, ref_c, ref_r, beta) + e * dpo(r, c, ref_r, ref_c, beta)


def hinge(c, r, ref_c, ref_r, beta):  # Liu et al. 2023, hinge-norm
    return max(0.0, 1 - (beta * (c - ref_c) - beta * (r - ref_r)))


def ipo(c, r, ref_c, ref_r, tau):  # Azar et al. 2023, eq. 17
    return ((c - r) - (ref_c - ref_r) - 1 / (2 * tau)) ** 2


def kto(y, ry, desirable, z0, beta, weights):  # Ethayarajh et al. 2024, eq. 7
    ratio = y - ry
    value = weights[0] * sigmoid(beta * (ratio - z0)) if desirable else weights[1] * sigmoid(beta * (z0 - ratio))
    return weights[0 if desirable else 1] - value


def orpo(c, r, weight):  # Hong et al. 2024, eqs. 6 and 7
    return weight * -math.log(sigmoid(math.log(odds(math.exp(c)) / odds(math.exp(r)))))


def simpo(c, r, beta, gamma):  # Meng et al. 2024, eq. 6
    return -math.log(sigmoid(beta * c - beta * r - gamma))


def each(formula, columns, *options):
    return vectors([formula(*row, *options) for row in zip(*columns)])


same = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14)


def test_dpo_is_its_papers_formula_and_rewards_are_scaled_log_ratios():
    c, r, ref_c, ref_r = vectors(SUMS)
    losses, chosen, rejected = dpo_loss(c, r, ref_c, ref_r, beta=0.3)
    same(losses, each(dpo, SUMS, 0.3))
    same(chosen, 0.3 * (c - ref_c))
    same(rejected, 0.3 * (r - ref_r))


def test_label_smoothing_is_conservative_dpo():
    same(dpo_loss(*vectors(SUMS), beta=0.3, label_smoothing=0.2)[0], each(conservative_dpo, SUMS, 0.3, 0.2))


def test_hinge_is_its_papers_formula():
    losses = hinge_loss(*vectors(SUMS), beta=0.3)[0]
    same(losses, each(hinge, SUMS, 0.3))
    assert losses.tolist().count(0.0) == 2  # pairs that are far enough apart


def test_ipo_is_its_papers_formula():
    losses, chosen, _ = ipo_loss(*vectors(MEANS), beta=0.2)
    same(losses, each(ipo, MEANS, 0.2))
    same(chosen, 0.2 * (vectors(MEANS)[0] - vectors(MEANS)[2]))


def test_kto_is_its_papers_formula():
    y, ry = vectors(SUMS[0]), vectors(SUMS[2])
    losses, rewards = kto_loss(y, ry, torch.tensor(DESIRABLE), 1.5, 0.3, desirable_weight=1.2, undesirable_weight=0.7)
    same(losses, each(kto, [SUMS[0], SUMS[2], DESIRABLE], 1.5, 0.3, (1.2, 0.7)))
    same(rewards, 0.3 * (y - ry))


def test_orpo_is_its_papers_formula():
    c, r = vectors(MEANS[:2])
    losses, chosen, rejected = orpo_loss(c, r, beta=0.25)
    same(losses, each(orpo, MEANS[:2], 0.25))
    same((chosen, rejected), (0.25 * c, 0.25 * r))


def test_simpo_is_its_papers_formula():
    c, r = vectors(MEANS[:2])
    losses, chosen, rejected = simpo_loss(c, r, beta=2.5, gamma=1.4)
    same(losses, each(simpo, MEANS[:2], 2.5, 1.4))
    same((chosen, rejected), (2.5 * c, 2.5 * r))


def test_losses_by_name_take_what_their_entries_say():
    for name, entry in LOSSES.items():
        parameters = inspect.signature(entry.function).parameters
        takes = set(parameters)
        assert ("policy_chosen" in takes) == entry.paired, name
        assert any(argument.startswith("reference") for argument in takes) == entry.reference, name
        columns = [argument for argument in takes if argument.startswith(("policy", "reference"))]
        assert takes - set(columns) - {"desirable", "kl"} == {"beta", *entry.options}, name
        usual = {"beta": entry.beta, **entry.options}
        assert {argument: parameters[argument].default for argument in usual} == usual, name


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_small_differences(name):
    entry = LOSSES[name]
    numbers = vectors(MEANS if entry.mean else SUMS)
    if not entry.paired:
        function = partial(kto_loss, desirable=torch.tensor(DESIRABLE), kl=0.7)
        inputs = [numbers[0], numbers[2]]
    else:
        function, inputs = entry.function, list(numbers if entry.reference else numbers[:2])
    inputs = [x.clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: function(*x)[0], inputs)
    *_, last = function(*inputs)
    assert not last.requires_grad  # rewards are for looking at


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_log_probability_makes_a_loss_or_a_gradient_infinite(dtype):
    """Also those of a model that is sure, log p = 0, and of one that holds an answer impossible."""
    extremes = torch.tensor([0.0, -1e-30, -1e-9, -math.log(2), -50.0, -1e4], dtype=dtype)
    c, r = (x.flatten().clone().requires_grad_() for x in torch.meshgrid(extremes, extremes, indexing="ij"))
    reference = (torch.full_like(c, -3.0), torch.full_like(r, -5.0))
    for entry in LOSSES.values():
        if not entry.paired:
            losses = kto_loss(c, reference[0], c > r, 2.0)[0]
        else:
            losses = entry.function(c, r, *(reference if entry.reference else ()))[0]
        gradients = torch.autograd.grad(losses.sum(), (c, r), allow_unused=True)
        assert losses.isfinite().all()
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


def test_dpo_begins_at_the_logarithm_of_2():
    c, r = vectors(SUMS[:2])
    same(dpo_loss(c, r, c, r)[0], torch.full_like(c, math.log(2)))


def test_dpo_loss_is_a_part_of_the_library():
    assert minillm.dpo_loss is dpo_loss
