import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillm.losses import (
    IGNORE_INDEX,
    Penalties,
    chunked_cross_entropy,
    chunked_losses,
    chunks,
    cross_entropy,
    loss_and_hits,
    penalised_cross_entropy,
    token_logprobs,
)
from minillm.losses.heads import default_chunk_tokens, logits_bytes

V, D = 37, 16


def minus_logprobs(lm_head, hidden, targets, **options):
    return -token_logprobs(lm_head, hidden, targets, **options).sum()


CHUNKED = [chunked_cross_entropy, minus_logprobs]


def problem(dtype=torch.float64, bias=False, rows=V, ignored=(), seed=0):
    """A head, a hidden state (2, 9, D) and targets, some of them ignored."""
    torch.manual_seed(seed)
    lm_head = nn.Linear(D, rows, bias=bias).to(dtype)
    hidden = torch.randn(2, 9, D, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, V, (2, 9))
    targets.view(-1)[list(ignored)] = IGNORE_INDEX
    return lm_head, hidden, targets


def value_and_gradients(loss, lm_head, hidden, targets, scale=1.0, **options):
    parameters = [hidden, *lm_head.parameters()]
    for parameter in parameters:
        parameter.grad = None
    value = loss(lm_head, hidden, targets, **options)
    (value * scale).backward()
    return [value.detach(), *(p.grad for p in parameters)]


def test_plain_loss_is_the_sum_of_pytorchs():
    lm_head, hidden, targets = problem(ignored=[3])
    expected = F.cross_entropy(lm_head(hidden).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(cross_entropy(lm_head, hidden, targets), expected)


@pytest.mark.parametrize("loss", CHUNKED)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 17, 18, 1000, None])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_chunked_values_and_gradients_are_the_plain_ones(loss, chunk_tokens, bias, dtype, tolerance):
    data = problem(dtype, bias, ignored=[0, 5, 6, 17])
    plain = value_and_gradients(cross_entropy, *data, scale=0.3)
    for skip_ignored in (None, False, True):
        chunked = value_and_gradients(loss, *data, scale=0.3, chunk_tokens=chunk_tokens, skip_ignored=skip_ignored)
        torch.testing.assert_close(chunked, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("loss", CHUNKED)
def test_gradients_agree_with_finite_differences(loss):
    check_finite_differences(loss)


def check_finite_differences(loss, **options):
    """As torch.autograd.gradcheck does, but with one backward, which is all that the chunked loss allows."""
    lm_head, hidden, targets = problem(bias=True, ignored=[2])
    gradients = value_and_gradients(loss, lm_head, hidden, targets, chunk_tokens=5, **options)[1:]
    for parameter, gradient in zip([hidden, *lm_head.parameters()], gradients):
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter += sign * 1e-5 * direction
                values.append(loss(lm_head, hidden, targets, chunk_tokens=5, **options))
                parameter -= sign * 1e-5 * direction
        assert (values[0] - values[1]).item() / 2e-5 == pytest.approx((direction * gradient).sum().item(), rel=1e-7)


@pytest.mark.parametrize("loss", CHUNKED)
def test_padding_rows_of_the_vocabulary_take_no_part(loss):
    lm_head, hidden, targets = problem(bias=True, rows=V + 11)
    small = nn.Linear(D, V).double()
    with torch.no_grad():
        lm_head.weight[V:] = 100.0
        small.weight.copy_(lm_head.weight[:V])
        small.bias.copy_(lm_head.bias[:V])
    expected = value_and_gradients(cross_entropy, small, hidden, targets)
    for candidate in (loss, cross_entropy):
        value, of_hidden, of_weight, of_bias = value_and_gradients(candidate, lm_head, hidden, targets, vocab_size=V)
        torch.testing.assert_close([value, of_hidden, of_weight[:V], of_bias[:V]], expected)
        assert not of_weight[V:].any()
        assert not of_bias[V:].any()


@pytest.mark.parametrize("loss", CHUNKED)
@pytest.mark.parametrize("skip_ignored", [True, False])
def test_a_batch_of_ignored_targets_has_loss_and_gradients_zero(loss, skip_ignored):
    data = problem(bias=True, ignored=range(18))
    for tensor in value_and_gradients(loss, *data, skip_ignored=skip_ignored):
        assert torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize("loss", CHUNKED)
def test_rows_without_a_target_are_not_computed(loss, monkeypatch):
    computed = []
    original = chunks.softmax_chunks
    monkeypatch.setattr(
        chunks, "softmax_chunks", lambda rows, *rest: computed.append(len(rows)) or original(rows, *rest)
    )
    value_and_gradients(loss, *problem(ignored=range(5)))
    assert set(computed) == {13}


def test_logprobs_keep_their_place():
    lm_head, hidden, targets = problem(ignored=[1, 9])
    expected = lm_head(hidden).log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    expected = expected.where(targets != IGNORE_INDEX, 0)
    torch.testing.assert_close(token_logprobs(lm_head, hidden, targets, chunk_tokens=4), expected)


def test_logprobs_pass_a_gradient_of_each_token():
    lm_head, hidden, targets = problem(ignored=[1, 9])
    weights = torch.randn(2, 9, dtype=torch.float64)

    def plain(lm_head, hidden, targets):
        logprobs = -F.cross_entropy(lm_head(hidden).flatten(0, 1), targets.flatten(), reduction="none")
        return (logprobs.view(2, 9) * weights).sigmoid().sum()

    def chunked(lm_head, hidden, targets):
        return (token_logprobs(lm_head, hidden, targets, chunk_tokens=4) * weights).sigmoid().sum()

    data = lm_head, hidden, targets
    torch.testing.assert_close(value_and_gradients(chunked, *data), value_and_gradients(plain, *data))


@pytest.mark.parametrize("loss", CHUNKED)
def test_tied_embeddings_sum_both_gradients(loss):
    embed, lm_head = nn.Embedding(V, D).double(), nn.Linear(D, V, bias=False).double()
    lm_head.weight = embed.weight
    tokens, targets = torch.randint(0, V, (2, 9)), torch.randint(0, V, (2, 9))
    gradients = []
    for candidate in (cross_entropy, loss):
        embed.weight.grad = None
        candidate(lm_head, embed(tokens).tanh(), targets).backward()
        gradients.append(embed.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("loss", CHUNKED)
@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_only_needed_gradients_are_made(loss, frozen):
    lm_head, hidden, targets = problem()
    expected = value_and_gradients(cross_entropy, lm_head, hidden, targets)
    (lm_head.weight if frozen == "weight" else hidden).requires_grad_(False)
    _, of_hidden, of_weight = value_and_gradients(loss, lm_head, hidden, targets)
    assert (of_weight if frozen == "weight" else of_hidden) is None
    torch.testing.assert_close(
        of_hidden if frozen == "weight" else of_weight, expected[1] if frozen == "weight" else expected[2]
    )


def test_without_gradients_none_is_computed(monkeypatch):
    lm_head, hidden, targets = problem()
    expected = cross_entropy(lm_head, hidden, targets).detach()
    monkeypatch.setattr(chunks, "Gradients", None)
    with torch.no_grad():
        torch.testing.assert_close(chunked_cross_entropy(lm_head, hidden, targets, chunk_tokens=4), expected)
    frozen = nn.Linear(D, V, bias=False).double().requires_grad_(False)
    assert not chunked_cross_entropy(frozen, hidden.detach(), targets).requires_grad


@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000, None])
@pytest.mark.parametrize("rows", [V, V + 5])
def test_hits_are_the_targets_that_come_first_of_all_logits(chunk_tokens, rows):
    lm_head, hidden, targets = problem(bias=True, rows=rows, ignored=[0, 5, 17])
    targets[0, 3], targets[1, 2] = lm_head(hidden)[..., :V].argmax(-1)[[0, 1], [3, 2]]
    hits = int((lm_head(hidden)[..., :V].argmax(-1) == targets).sum())
    assert hits >= 2
    loss, found = loss_and_hits(lm_head, hidden, targets, vocab_size=V, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(loss, cross_entropy(lm_head, hidden, targets, vocab_size=V).detach())
    assert (found.item(), loss.requires_grad) == (hits, False)


def test_of_tokens_equally_likely_one_is_hit():
    lm_head = nn.Linear(D, V, bias=False)
    nn.init.zeros_(lm_head.weight)
    assert loss_and_hits(lm_head, torch.randn(1, V, D), torch.arange(V)[None])[1] == 1


def test_nothing_to_predict_has_neither_loss_nor_hits():
    lm_head, hidden, targets = problem(ignored=range(18))
    assert [x.item() for x in loss_and_hits(lm_head, hidden, targets)] == [0, 0]


@pytest.mark.parametrize("loss", CHUNKED)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("half_hidden", [True, False])
def test_autocast_multiplies_in_half_precision_and_sums_in_full(loss, dtype, tolerance, half_hidden):
    lm_head, hidden, targets = problem(torch.float32, bias=True, ignored=[4])
    exact = value_and_gradients(cross_entropy, lm_head, hidden, targets)
    data = lm_head, hidden.detach().to(dtype).requires_grad_() if half_hidden else hidden, targets
    with torch.autocast("cpu", dtype):
        value = loss(*data, chunk_tokens=4)
    assert value.dtype == torch.float32
    for parameter in (data[1], *lm_head.parameters()):
        parameter.grad = None
    value.backward()
    results = [value.detach(), data[1].grad, lm_head.weight.grad, lm_head.bias.grad]
    assert [r.dtype for r in results[1:]] == [data[1].dtype, torch.float32, torch.float32]
    for result, expected in zip(results, exact):
        assert (result.float() - expected).norm() <= tolerance * expected.norm()


def test_half_precision_sums_over_chunks_do_not_lose_small_parts():
    # 512 rows alike: a bf16 sum over chunks of one row, 0.5 each, would stop growing at 128
    lm_head = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(lm_head.weight)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(lm_head, torch.ones(1, 512, 1), torch.zeros(1, 512).long(), chunk_tokens=1)
    loss.backward()
    assert lm_head.weight.grad.flatten().tolist() == [-256, 256]


def test_large_logits_stay_finite():
    lm_head, hidden, targets = problem(torch.float32)
    with torch.no_grad():
        lm_head.weight *= 1e4
    results = value_and_gradients(chunked_cross_entropy, lm_head, hidden, targets)
    torch.testing.assert_close(results, value_and_gradients(cross_entropy, lm_head, hidden, targets))
    assert all(result.isfinite().all() for result in results)


def test_a_second_backward_is_refused():
    loss = chunked_cross_entropy(*problem())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_the_weight_gradient_is_handed_over_not_copied():
    lm_head, hidden, targets = problem()
    loss = chunked_cross_entropy(lm_head, hidden, targets)
    place = loss.grad_fn.gradients[1].data_ptr()
    loss.backward()
    assert lm_head.weight.grad.data_ptr() == place


def test_a_chunk_stays_within_its_budget():
    for vocab_size, n_rows in [(65, 100_000), (6400, 8192), (50_304, 2048), (151_936, 2048), (300_000_000, 5)]:
        chunk = default_chunk_tokens(n_rows, vocab_size, torch.device("cpu"))
        assert chunk == 1 or 4 * chunk * vocab_size <= logits_bytes(torch.device("cpu"))
        n_chunks = -(-n_rows // chunk)
        assert n_chunks * chunk - n_rows < n_chunks  # equal parts


@pytest.mark.parametrize("loss", [cross_entropy, *CHUNKED])
def test_the_largest_tensor_is_a_chunk_of_logits(loss):
    """Watches every tensor that torch makes: none reaches the size of the logits, unless the loss is the plain one."""
    lm_head, hidden, targets = problem(torch.float32, rows=600)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (result if isinstance(result, tuple) else [result]) if torch.is_tensor(x))
            return result

    options = {} if loss is cross_entropy else {"chunk_tokens": 2}
    with Watch():
        value_and_gradients(loss, lm_head, hidden, targets, **options)
    largest = max(sizes)
    assert largest == (18 * 600 if loss is cross_entropy else lm_head.weight.numel())


class Adapted(nn.Module):
    """A head that is not a plain projection."""

    def __init__(self, base):
        super().__init__()
        self.base, self.extra = base, nn.Linear(D, base.out_features, bias=False).to(base.weight.dtype)
        self.weight, self.bias, self.out_features = base.weight, base.bias, base.out_features

    def forward(self, x):
        return self.base(x) + self.extra(x)


@pytest.mark.parametrize("loss", CHUNKED)
@pytest.mark.parametrize("ignored", [[3, 4], range(18)])
def test_a_head_with_an_adapter_is_called_in_chunks(loss, ignored):
    lm_head, hidden, targets = problem(ignored=ignored)
    lm_head = Adapted(lm_head)
    expected = value_and_gradients(cross_entropy, lm_head, hidden, targets)
    torch.testing.assert_close(value_and_gradients(loss, lm_head, hidden, targets, chunk_tokens=5), expected)


@pytest.mark.parametrize("loss", CHUNKED)
def test_hooks_on_the_head_run(loss):
    lm_head, hidden, targets = problem()
    lm_head.register_forward_hook(lambda module, args, output: output * 2)
    expected = value_and_gradients(cross_entropy, lm_head, hidden, targets)
    torch.testing.assert_close(value_and_gradients(loss, lm_head, hidden, targets, chunk_tokens=5), expected)


@pytest.mark.parametrize("loss", CHUNKED)
@pytest.mark.parametrize("target", [V, 10**6, -1])
@pytest.mark.parametrize("grad", [True, False])
def test_a_target_beyond_the_vocabulary_is_named(loss, target, grad):
    lm_head, hidden, targets = problem()
    targets[1, 3] = target
    context = contextlib.nullcontext() if grad else torch.no_grad()
    with context, pytest.raises(ValueError, match=rf"target {target} at \(1, 3\).*0 to {V - 1}"):
        loss(lm_head, hidden, targets)


def test_targets_of_another_shape_are_refused():
    lm_head, hidden, targets = problem()
    with pytest.raises(ValueError, match=r"\(2, 8\)"):
        chunked_cross_entropy(lm_head, hidden, targets[:, :8])


# --- penalties --------------------------------------------------------------------------------------------------------

PENALTIES = [Penalties(0.1, 0.0), Penalties(0.0, 1e-2), Penalties(0.3, 0.5)]


def written_out(lm_head, hidden, targets, penalties, vocab_size=V):
    """The definition, target by target."""
    total = 0.0
    for h, t in zip(hidden.flatten(0, 1), targets.flatten().tolist()):
        if t == IGNORE_INDEX:
            continue
        logits = lm_head(h)[:vocab_size]
        log_z = logits.exp().sum().log()
        minus_logp = log_z - logits
        total = total + (1 - penalties.label_smoothing) * minus_logp[t] + penalties.z_loss * log_z**2
        total = total + penalties.label_smoothing * minus_logp.sum() / vocab_size
    return total


def totals(loss):
    return lambda *args, **options: loss(*args, **options).total


@pytest.mark.parametrize("loss", [chunked_losses, penalised_cross_entropy])
@pytest.mark.parametrize("penalties", PENALTIES)
@pytest.mark.parametrize("chunked", [{"chunk_tokens": 4}, {"chunk_tokens": 7, "skip_ignored": False}, {}])
def test_penalties_are_their_definition(loss, penalties, chunked):
    """Values and gradients; rows of padding in the vocabulary take no part, nor do ignored targets."""
    data = problem(bias=True, rows=V + 5, ignored=[0, 5, 17])
    expected = value_and_gradients(written_out, *data, scale=0.3, penalties=penalties)
    options = {"vocab_size": V, "penalties": penalties} | (chunked if loss is chunked_losses else {})
    torch.testing.assert_close(value_and_gradients(totals(loss), *data, scale=0.3, **options), expected)


def test_label_smoothing_is_pytorchs():
    lm_head, hidden, targets = problem(ignored=[3])
    logits = lm_head(hidden).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), reduction="sum", label_smoothing=0.2)
    torch.testing.assert_close(chunked_losses(lm_head, hidden, targets, penalties=Penalties(0.2)).total, expected)


@pytest.mark.parametrize("penalties", PENALTIES)
def test_penalised_gradients_agree_with_finite_differences(penalties):
    check_finite_differences(totals(chunked_losses), penalties=penalties)


@pytest.mark.parametrize("penalties", PENALTIES)
def test_the_plain_loss_comes_along(penalties):
    data = problem(bias=True, ignored=[2])
    for losses_of in (chunked_losses, penalised_cross_entropy):
        for context in (contextlib.nullcontext(), torch.no_grad()):
            with context:
                result = losses_of(*data, penalties=penalties)
            assert not result.cross_entropy.requires_grad
            torch.testing.assert_close(result.cross_entropy, cross_entropy(*data).detach())
            smoothing = Penalties(penalties.label_smoothing)
            without_z = losses_of(*data, penalties=smoothing).total
            torch.testing.assert_close(result.z_loss, (result.total - without_z).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_penalties_nothing_changes_to_the_bit(dtype):
    data = problem(dtype, bias=True, ignored=[2, 9])
    plain = value_and_gradients(chunked_cross_entropy, *data, chunk_tokens=4)
    for penalties in (Penalties(), Penalties(0, 0)):
        result = value_and_gradients(totals(chunked_losses), *data, chunk_tokens=4, penalties=penalties)
        assert all(torch.equal(a, b) for a, b in zip(result, plain))


@pytest.mark.parametrize("penalties", PENALTIES)
def test_penalties_reach_a_head_with_an_adapter(penalties):
    lm_head, hidden, targets = problem(ignored=[3, 4])
    data = Adapted(lm_head), hidden, targets
    expected = value_and_gradients(totals(penalised_cross_entropy), *data, penalties=penalties)
    result = value_and_gradients(totals(chunked_losses), *data, penalties=penalties, chunk_tokens=5)
    torch.testing.assert_close(result, expected)


def test_penalties_make_no_larger_tensor():
    lm_head, hidden, targets = problem(torch.float32, rows=600)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (result if isinstance(result, tuple) else [result]) if torch.is_tensor(x))
            return result

    with Watch():
        value_and_gradients(totals(chunked_losses), lm_head, hidden, targets, chunk_tokens=2, penalties=PENALTIES[2])
    assert max(sizes) == lm_head.weight.numel()


@pytest.mark.parametrize("penalties", PENALTIES)
def test_penalties_under_autocast_stay_near(penalties):
    data = problem(torch.float32, bias=True, ignored=[4])
    exact = value_and_gradients(totals(penalised_cross_entropy), *data, penalties=penalties)
    with torch.autocast("cpu", torch.bfloat16):
        half = value_and_gradients(totals(chunked_losses), *data, chunk_tokens=4, penalties=penalties)
    for result, expected in zip(half, exact):
        assert (result - expected).norm() <= 2e-2 * expected.norm()
