"""Preferences in packed rows are what they are one by one; references stay what they were; what goes wrong is said."""

import contextlib
import copy
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from preferences import Trees, V, answer_logprobs, some_documents, unpaired
from ranks import run_ranks

from minillm.data.batch import Batch
from minillm.data.chat_templates import TEMPLATES
from minillm.data.config import PreferencesConfig
from minillm.data.loader import eval_batches
from minillm.data.preference_store import open_preferences
from minillm.data.store import verify
from minillm.data.trees import PairsConfig
from minillm.distributed.config import Layout
from minillm.distributed.context import Context, connect, with_mesh
from minillm.distributed.parallelize import parallelize
from minillm.eval.perplexity import evaluate
from minillm.files import temporary_for
from minillm.lora import LoRAConfig, adapted, apply_lora, base_parameters, init_lora
from minillm.losses import IGNORE_INDEX, LOSSES, kto_loss
from minillm.model.config import ModelConfig
from minillm.model.init import init_weights
from minillm.model.transformer import Transformer
from minillm.preference import (
    FallingChosen,
    Frozen,
    Kept,
    Preference,
    WithoutAdapters,
    cache_reference,
    cached,
    target_logprobs,
)
from minillm.preference.objective import by_branch, only, without
from minillm.tensors import local_part, narrowed, parameter_names
from minillm.tokenizer import ByteTokenizer
from minillm.trainer import TrainConfig, Trainer

SHAPE = {"vocab_size": V, "dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64}
ALONE = Context(torch.device("cpu"))


def model_of(seed=0, dtype=torch.float64, **changes):
    model = Transformer(ModelConfig(**SHAPE | changes))
    init_weights(model, seed)
    return model.to(dtype)


def documents_for(name, n=6):
    return some_documents(n, (1, 2) if LOSSES[name].paired else unpaired)


def reference_for(name, model):
    return Frozen(model) if LOSSES[name].reference else None


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# --- rows -------------------------------------------------------------------------------------------------------------


def expected_loss(name, model, reference, documents, sft_weight):
    """What is minimised, from forwards of one answer at a time: the mean of the losses, and the SFT term."""
    entry = LOSSES[name]
    reduce = torch.mean if entry.mean else torch.sum
    ours = answer_logprobs(model, documents)
    with torch.no_grad():
        theirs = answer_logprobs(reference, documents)
    if entry.paired:
        columns = [torch.stack([reduce(one[branch]) for one in ours]) for branch in (1, 2)]
        if entry.reference:
            columns += [torch.stack([reduce(one[branch]) for one in theirs]) for branch in (1, 2)]
        losses = entry.function(*columns)[0]
    else:
        ratios = [a[3].sum() - b[3].sum() for a, b in zip(ours, theirs)]
        kl = torch.stack(ratios).mean().clamp(min=0).detach()
        sums = [torch.stack([one[min(one)].sum() for one in each]) for each in (ours, theirs)]
        losses = kto_loss(*sums, torch.tensor([min(one) == 1 for one in ours]), kl)[0]
    sft = -torch.cat([one[1] for one in ours if 1 in one]).mean()
    return losses.mean() + sft_weight * sft


@pytest.mark.parametrize("name", LOSSES)
def test_packed_rows_with_shared_prompts_give_the_loss_and_gradient_of_answers_one_by_one(name):
    model, reference, documents = model_of(0), model_of(1), documents_for(name)
    expected = expected_loss(name, model, reference, documents, sft_weight=0.3)
    wanted = gradients(model, expected)
    objective = Preference(name, reference_for(name, reference), sft_weight=0.3)
    for batch in (Trees(documents).batch(48), Trees(documents).alone()):
        assert objective.count(batch) == len(documents)
        prepared = objective.prepare(model, [batch], lambda tensor: tensor)
        loss = prepared(model, batch)[0] / len(documents)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(gradients(model, loss), wanted, rtol=1e-8, atol=1e-11)
        # without knowing of others, the batch is taken for all there is; the share of a token is in fp32
        torch.testing.assert_close(objective(model, batch)[0] / len(documents), expected, rtol=1e-6, atol=0)
    assert len(Trees(documents).batch(48).tokens) < len(documents)  # several a row


def test_the_kl_of_kto_is_that_of_answers_to_other_prompts_and_has_no_gradient():
    """Of a policy that finds these likelier than the reference does, for of others it is 0."""
    model, reference, documents = model_of(1), model_of(0), documents_for("kto")
    expected = expected_loss("kto", model, reference, documents, sft_weight=0.0)
    wanted, batch = gradients(model, expected), Trees(documents).batch(48)
    objective = Preference("kto", Frozen(reference))
    for known in (objective, objective.prepare(model, [batch], lambda tensor: tensor)):
        loss_sum, metrics = known(model, batch)
        assert metrics["kto_kl"][0] > 0.1
        torch.testing.assert_close(loss_sum / len(documents), expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(gradients(model, loss_sum / len(documents)), wanted, rtol=1e-8, atol=1e-11)


def test_metrics_are_means_over_pairs_of_what_answers_give_one_by_one():
    model, reference, documents = model_of(0), model_of(1), documents_for("dpo")
    _, metrics = Preference("dpo", Frozen(reference), beta=0.2, sft_weight=1.0)(model, Trees(documents).batch(48))
    found = {name: float(total) / float(count) for name, (total, count) in metrics.items()}
    with torch.no_grad():
        ours, theirs = answer_logprobs(model, documents), answer_logprobs(reference, documents)
    mean = {
        (who, branch): sum(float(one[branch].sum()) for one in each) / len(documents)
        for who, each in (("ours", ours), ("theirs", theirs))
        for branch in (1, 2)
    }
    margins = [0.2 * float(a[1].sum() - b[1].sum() - a[2].sum() + b[2].sum()) for a, b in zip(ours, theirs)]
    tokens = torch.cat([a[branch] - b[branch] for a, b in zip(ours, theirs) for branch in (1, 2)])
    expected = {
        "loss": sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins),
        "sft_loss": -float(torch.cat([one[1] for one in ours]).mean()),
        "logprobs_chosen": mean["ours", 1],
        "logprobs_rejected": mean["ours", 2],
        "reference_logprobs_chosen": mean["theirs", 1],
        "reference_logprobs_rejected": mean["theirs", 2],
        "rewards_chosen": 0.2 * (mean["ours", 1] - mean["theirs", 1]),
        "rewards_rejected": 0.2 * (mean["ours", 2] - mean["theirs", 2]),
        "margin": sum(margins) / len(margins),
        "preference_accuracy": sum(margin > 0 for margin in margins) / len(margins),
        "ranking_accuracy": sum(float(one[1].sum() > one[2].sum()) for one in ours) / len(ours),
        "length_chosen": sum(len(answers[1]) for _, answers in documents) / len(documents),
        "length_rejected": sum(len(answers[2]) for _, answers in documents) / len(documents),
        "kl": float((tokens**2 / 2).mean()),
    }
    assert found == pytest.approx(expected, rel=1e-9)
    assert 0 < found["preference_accuracy"] < 1


def kto_figures(model, reference, documents, batches):
    """What KTO says of documents, and the same from forwards of one answer at a time."""
    objective = Preference("kto", Frozen(reference), beta=0.2).prepare(model, batches, lambda tensor: tensor)
    metrics = [objective(model, batch)[1] for batch in batches]
    totals = {name: [sum(float(one[name][i]) for one in metrics) for i in (0, 1)] for name in metrics[0]}
    found = {name: total / count for name, (total, count) in totals.items() if count}
    with torch.no_grad():
        ratios = [
            {branch: float(a[branch].sum() - b[branch].sum()) for branch in a}
            for a, b in zip(answer_logprobs(model, documents), answer_logprobs(reference, documents))
        ]
    kl = max(0.0, sum(one[3] for one in ratios) / len(ratios))
    rewards = {branch: [0.2 * one[branch] for one in ratios if branch in one] for branch in (1, 2)}
    right = [reward > 0.2 * kl for reward in rewards[1]] + [reward < 0.2 * kl for reward in rewards[2]]
    expected = {f"rewards_{side}": sum(r) / len(r) for side, r in zip(("chosen", "rejected"), rewards.values()) if r}
    expected |= {"kto_kl": kl, "label_accuracy": sum(right) / len(right)}
    return found, expected


def test_answers_with_labels_are_told_apart_by_the_point_from_which_gains_count():
    """However they fall into batches: of either kind there are not equally many in each."""
    model, reference, documents = model_of(0), model_of(1), documents_for("kto", 14)
    whole = Trees(documents).batch(48)
    for batches in ([whole], [whole.rows(0, 1), whole.rows(1, len(whole.tokens))]):
        found, expected = kto_figures(model, reference, documents, batches)
        expected["margin"] = expected["rewards_chosen"] - expected["rewards_rejected"]
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert 0 < found["label_accuracy"] < 1
    assert found["kto_kl"] > 0


@pytest.mark.parametrize(("kind", "said", "missing"), [(1, "chosen", "rejected"), (2, "rejected", "chosen")])
def test_answers_of_one_kind_have_no_margin(kind, said, missing):
    documents = some_documents(6, (kind, 3))
    found, expected = kto_figures(model_of(0), model_of(1), documents, [Trees(documents).batch(48)])
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert f"rewards_{said}" in found
    assert not {"margin", f"rewards_{missing}"} & found.keys()


def test_losses_by_means_rank_answers_by_means():
    model, documents = model_of(), documents_for("simpo", 12)
    total, count = Preference("simpo")(model, Trees(documents).batch(48))[1]["ranking_accuracy"]
    with torch.no_grad():
        ours = answer_logprobs(model, documents)
    shares = [sum(float(reduce(one[1]) > reduce(one[2])) for one in ours) for reduce in (torch.mean, torch.sum)]
    assert (float(total), float(count)) == (shares[0], 12)
    assert shares[0] != shares[1]


def test_before_the_first_step_the_loss_is_that_of_a_guess():
    model, batch = model_of(), Trees(documents_for("dpo")).batch(48)
    loss_sum, metrics = Preference("dpo", Frozen(copy.deepcopy(model)), sft_weight=0.0)(model, batch)
    assert loss_sum.item() / 6 == pytest.approx(math.log(2), abs=1e-12)
    found = {name: float(total) / float(count) for name, (total, count) in metrics.items()}
    assert (found["margin"], found["kl"], found["preference_accuracy"]) == (0.0, 0.0, 0.5)


def test_answers_of_another_kind_and_padding_count_for_nothing():
    model, documents = model_of(), documents_for("dpo")
    objective = Preference("dpo", Frozen(model_of(1)), sft_weight=0.0)
    with_others = Trees([*documents, *some_documents(2, (1,), seed=5)]).batch(48)
    assert objective.count(with_others) == 6
    torch.testing.assert_close(objective(model, with_others)[0], objective(model, Trees(documents).batch(48))[0])
    nothing = with_others._replace(targets=torch.full_like(with_others.targets, -100))
    loss_sum, metrics = objective(model, nothing)
    assert objective.count(nothing) == loss_sum.item() == 0
    assert {float(count) for _, count in metrics.values()} == {0.0}
    assert all(gradient.isfinite().all() for gradient in gradients(model, loss_sum).values())


def test_tokens_that_a_forward_does_not_need_are_left_out_of_it():
    """Also where nothing is left of a document, and where a row is nothing but padding."""
    model = model_of(max_seq_len=128)
    documents = [
        *some_documents(12, unpaired, longest=9),
        ([1], {1: [2, 3]}),
        *some_documents(3, (3, 2), seed=4),
        ([5], {2: [6]}),
    ]
    batch = Trees(documents).batch(128)
    batch = Batch(*(field if field is None else torch.cat([field, field[:1]]) for field in batch))
    batch.targets[-1] = IGNORE_INDEX
    for branch in (1, 2, 3):
        masked = only(batch, batch.branches == branch)
        left = without(batch, (batch.branches != branch) & (batch.branches != 0))
        assert left.tokens.shape[1] < batch.tokens.shape[1]
        found, expected = (by_branch(one, target_logprobs(model, one))[:, branch] for one in (left, masked))
        torch.testing.assert_close(found[found != 0], expected[expected != 0], rtol=1e-9, atol=1e-12)
        assert (found != 0).sum() > 3
        assert not by_branch(left, torch.ones_like(left.targets))[:, [b for b in range(4) if b != branch]].any()


def test_of_rows_that_are_cut_each_document_has_a_place():
    kept = [([3], {2: [4]})]
    batch = Trees([*kept, *[([1], {1: [2]})] * 20, *kept]).batch(32)
    left = without(batch, batch.branches == 1)
    assert left.tokens.shape == (1, 16)
    assert by_branch(left, torch.ones_like(left.targets)).sum(0).tolist() == [0, 0, 2, 0]


def test_a_held_out_set_is_evaluated_like_any_other():
    model, store = model_of(), Trees(documents_for("dpo"))
    objective = Preference("dpo", Frozen(model_of(1)), sft_weight=0.5)
    found = evaluate(model, [store.alone()], objective)
    _, metrics = objective(model, store.batch(48))
    for name in ("loss", "preference_accuracy", "margin", "logprobs_chosen"):
        total, count = metrics[name]
        assert found[f"val_{name}"] == pytest.approx(float(total) / float(count)), name
    assert found["tokens"] == 6


@pytest.mark.parametrize(("kind", "said", "missing"), [(1, "chosen", "rejected"), (2, "rejected", "chosen")])
def test_held_out_answers_may_all_be_of_one_kind(kind, said, missing):
    objective = Preference("kto", Frozen(model_of(1)))
    found = evaluate(model_of(), [Trees(some_documents(4, (kind, 3))).batch(48)], objective)
    assert f"val_logprobs_{said}" in found
    assert f"val_logprobs_{missing}" not in found


# --- the whole batch --------------------------------------------------------------------------------------------------

CASES = [("dpo", 0.5, False), ("kto", 0.3, True), ("orpo", None, False)]  # the loss, sft_weight, whether adapters


def some_pairs(i):
    """Of every fifth document there is no pair, so that micro-batches and ranks have different numbers of them."""
    return (1, 2) if i % 5 else (1,)


class Dealt:
    """Twelve documents a step, a row each, dealt to ranks like cards and divided into micro-batches."""

    samples_per_step, samples_per_epoch, tokens_per_step = 12, 1200, 12 * 32

    def __init__(self, name, dist, accumulation):
        self.name, self.dist, self.accumulation = name, dist, accumulation

    def batches(self, cursor):
        branches = some_pairs if LOSSES[self.name].paired else unpaired
        rows = Trees(some_documents(12, branches, seed=cursor)).alone()
        n = 12 // self.dist.dp_size // self.accumulation
        mine = [field if field is None else field[self.dist.dp_rank :: self.dist.dp_size] for field in rows]
        return [type(rows)(*mine).rows(i * n, i * n + n) for i in range(self.accumulation)]


def begun(layout, dist, adapters):
    """A policy in the middle of a run, and what it is compared with."""
    with torch.device("meta"):
        model = apply_lora(Transformer(ModelConfig(**SHAPE)), LoRAConfig(r=4 * adapters))

    @torch.no_grad()
    def init(model):
        start = model_of(dtype=torch.float32)
        for name, parameter in base_parameters(model).items():
            part, offset = local_part(parameter)
            part.copy_(1.5 * narrowed(start.get_parameter(name), offset, part.shape))  # so that answers differ
        init_lora(model)

    model = parallelize(model, dist=dist, layout=layout, init=init)
    reference = WithoutAdapters(model) if adapters else Kept(model)
    with torch.no_grad():
        for name, parameter in parameter_names(model).items():
            if name.endswith("lora_b"):
                parameter.copy_(parameter - 0.05)  # as if it had been trained, so that there is a KL
            elif parameter.requires_grad:
                parameter.mul_(0.9)
    return model, reference


def three_steps(name, sft_weight, adapters, layout, dist, accumulations):
    """Figures and weights after three steps, for each number of micro-batches."""
    found = []
    for accumulation in accumulations:
        model, reference = begun(layout, dist, adapters)
        reference = reference if LOSSES[name].reference else None
        trainer = Trainer(
            model,
            torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.3),
            Preference(name, reference, sft_weight=sft_weight),
            Dealt(name, dist, accumulation),
            TrainConfig(precision="fp32"),
            steps=3,
            lr_at=lambda step: 0.3,
            dist=dist,
            grad_clip=None,
        )
        figures = [trainer.step() for _ in range(3)]
        weights = {name: whole(parameter) for name, parameter in trainer.parameters.items()}
        if reference:
            reference.check()
        found.append((figures, weights))
    return found


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def all_cases(layout, accumulations):
    with connect("cpu", timeout=60) as dist:
        dist = with_mesh(dist, layout.dp_replicate, layout.dp_shard, layout.tp)
        return [three_steps(*case, layout, dist, accumulations) for case in CASES]


@pytest.mark.parametrize("layout", [Layout("ddp", 2, 1, 1), Layout("fsdp", 1, 2, 1)], ids=lambda one: one.strategy)
def test_neither_micro_batches_nor_ranks_change_a_step(layout):
    """Nor what is known of the global batch alone: KTO's KL, and the tokens that the SFT term is divided by."""
    expected = [case[0] for case in all_cases(Layout("ddp", 1, 1, 1), [1])]
    divided = [all_cases(Layout("ddp", 1, 1, 1), [4])] * (layout.strategy == "ddp")
    for cases in (*divided, *run_ranks(2, all_cases, layout, [3])):
        for (figures, weights), found in zip(expected, cases):
            for its_figures, its_weights in found:
                for step, its_step in zip(figures, its_figures):
                    assert its_step == pytest.approx(step, rel=1e-4, abs=1e-6)
                for name, weight in weights.items():
                    assert (its_weights[name] - weight).norm() / weight.norm() < 1e-5, name
    assert max(step["kto_kl"] for step in expected[1][0]) > 0.01


# --- references -------------------------------------------------------------------------------------------------------


class Rows:
    """The same rows in each step."""

    samples_per_step, samples_per_epoch, tokens_per_step = 6, 6, 96

    def __init__(self, *batches):
        self.given = batches

    def batches(self, cursor):
        return list(self.given)


def trainer_of(model, objective, *batches, **fields):
    return Trainer(
        model,
        torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5),
        objective,
        Rows(*batches),
        TrainConfig(precision="fp32", **fields),
        steps=3,
        lr_at=lambda step: 0.5,
        dist=ALONE,
        grad_clip=None,
    )


def with_adapters(model, trained=False, **config):
    apply_lora(model, LoRAConfig(r=4, **config))
    if trained:
        with torch.no_grad():
            for layer in adapted(model).values():
                layer.lora_b.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
    return model


def parameters_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


STARTS = {
    "frozen": lambda: model_of(dtype=torch.float32),
    "without adapters": lambda: with_adapters(model_of(dtype=torch.float32)),
    "adapters that go on": lambda: with_adapters(model_of(dtype=torch.float32), trained=True),
    "modules in full": lambda: with_adapters(model_of(dtype=torch.float32), modules_to_save=["norm"]),
    "kept": lambda: model_of(dtype=torch.float32),
}


def reference_of(kind, model):
    if kind == "frozen":
        return Frozen(copy.deepcopy(model))
    return WithoutAdapters(model) if kind == "without adapters" else Kept(model)


@pytest.mark.parametrize("kind", STARTS)
def test_a_reference_is_the_model_as_it_was_before_training_and_never_changes(kind):
    model, batch = STARTS[kind](), Trees(documents_for("dpo")).batch(48)
    start, modes = copy.deepcopy(model), [module.training for module in model.modules()]
    reference = reference_of(kind, model)
    trainer = trainer_of(model, Preference("dpo", reference), batch)
    first = trainer.step()
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["margin"] == 0.0
    assert trainer.step()["margin"] > 0  # the policy moves
    with torch.no_grad():
        assert not torch.equal(Frozen(copy.deepcopy(model))(model, batch), reference(model, batch))
    before = parameters_of(model)
    found = reference(model, batch)
    assert torch.equal(found, Frozen(start)(model, batch))
    assert not found.requires_grad
    after = parameters_of(model)
    assert all(torch.equal(after[name], parameter) for name, parameter in before.items())
    assert modes == [module.training for module in model.modules()]
    reference.check()


@pytest.mark.parametrize("kind", STARTS)
def test_a_reference_that_was_changed_is_noticed(kind):
    model = STARTS[kind]()
    reference = reference_of(kind, model)
    reference.check()
    held = {"frozen": lambda: reference.model.norm.weight, "without adapters": lambda: model.norm.weight}
    tensor = held.get(kind, lambda: next(iter(reference.copies.values())))()
    with torch.no_grad():
        tensor.flatten()[0] += 1e-3
    with pytest.raises(RuntimeError, match="the reference has changed"):
        reference.check()


def test_nothing_is_dropped_out_of_a_reference_and_it_takes_no_random_numbers(tmp_path):
    model, batch = model_of(dropout=0.5), Trees(documents_for("dpo")).batch(48)
    for reference in (Frozen(copy.deepcopy(model).train()), Kept(model.train())):
        torch.manual_seed(7)
        expected = reference(model, batch)
        assert torch.equal(reference(model, batch), expected)
        drawn = torch.rand(3)
        torch.manual_seed(7)
        assert torch.equal(torch.rand(3), drawn)
    prepared, modes = prepared_in(tmp_path), [module.training for module in model.modules()]
    cache(model, prepared)
    batch = prepared.train.batch(32)
    torch.testing.assert_close(batch.reference, Kept(model)(model, batch).float(), rtol=1e-5, atol=1e-5)
    assert modes == [module.training for module in model.modules()]


def test_a_policy_is_whole_again_after_a_forward_that_fails():
    model = model_of()
    before, reference = parameters_of(model), Kept(model)
    with torch.no_grad():
        model.norm.weight.add_(1)
    changed = parameters_of(model)
    with contextlib.suppress(KeyError), reference.in_place(model):
        assert torch.equal(model.norm.weight, before["norm.weight"])
        raise KeyError
    assert all(torch.equal(parameter, changed[name]) for name, parameter in model.named_parameters())


def test_adapters_without_a_base_that_stays_are_refused_as_one():
    with pytest.raises(ValueError, match="no adapters"):
        WithoutAdapters(model_of())
    with pytest.raises(ValueError, match="trained in full"):
        WithoutAdapters(with_adapters(model_of(), modules_to_save=["norm"]))


# --- a reference that is kept on disk ---------------------------------------------------------------------------------


def prepared_in(directory, data="data"):
    """Stores of random pairs, as they are prepared in a directory."""
    stores = {split: Trees(some_documents(9, seed=seed), split) for split, seed in (("train", 1), ("val", 2))}
    return SimpleNamespace(**stores, directory=Path(directory), info={"hash": data})


def cache(model, prepared, dist=ALONE, seq_len=32, rows=2, **changes):
    made_from = {"weights": "w", "precision": "fp32"} | changes
    return cache_reference(model, prepared, **made_from, seq_len=seq_len, rows=rows, dist=dist)


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_a_cached_reference_is_the_live_one(tmp_path, name):
    model, reference, prepared = model_of(0, torch.float32), model_of(1, torch.float32), prepared_in(tmp_path)
    live = Preference(name, Frozen(copy.deepcopy(reference)), sft_weight=0.1)
    kept = Preference(name, cached, sft_weight=0.1)
    with pytest.raises(ValueError, match="no cached log-probabilities"):
        kept(model, prepared.train.batch(32))
    with pytest.raises(ValueError, match="would cut preferences in two"):
        cache(reference, prepared, seq_len=16)
    cache(reference, prepared)
    for batch in (prepared.train.batch(32), prepared.val.batch(32), prepared.train.alone()):
        expected, found = (gradients(model, objective(model, batch)[0]) for objective in (live, kept))
        for parameter, gradient in expected.items():
            assert (found[parameter] - gradient).norm() / gradient.norm() < 1e-5
        torch.testing.assert_close(kept(model, batch), live(model, batch), rtol=1e-5, atol=1e-5)


def files_in(path):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def cache_on_a_rank(directory):
    with connect("cpu", timeout=60) as dist:
        return str(cache(model_of(1, torch.float32), prepared_in(directory), dist))


def test_ranks_that_share_the_work_write_what_one_alone_does(tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    alone.mkdir(), shared.mkdir()
    expected = cache(model_of(1, torch.float32), prepared_in(alone))
    assert run_ranks(2, cache_on_a_rank, shared) == [str(shared / expected.name)] * 2
    assert [path.name for path in shared.iterdir()] == [expected.name, *(p.name for p in shared.glob("packing*"))]
    prepared = prepared_in(shared)
    cache(None, prepared)  # which nobody computes again
    assert torch.allclose(prepared.train.batch(32).reference, reread(alone), atol=1e-6)


def reread(directory):
    prepared = prepared_in(directory)
    cache(None, prepared)
    return prepared.train.batch(32).reference


@pytest.mark.parametrize(
    ("changes", "data", "said"),
    [
        ({"weights": "others"}, "data", "is of other weights"),
        ({"precision": "bf16"}, "data", "is of another precision"),
        ({}, "other", "is of other data or another template"),
    ],
)
def test_what_was_computed_of_something_else_is_not_used_and_that_is_said(tmp_path, caplog, changes, data, said):
    first = cache(model_of(1, torch.float32), prepared_in(tmp_path))
    before = files_in(first)
    caplog.set_level("INFO")
    second = cache(model_of(2, torch.float32), prepared_in(tmp_path, data), **changes)
    assert second != first
    assert f"{first.name} {said}" in caplog.text
    size = sum(map(len, before.values()))
    kept = f"{size:,} bytes made for other runs are beside it; when none of these is to go on: rm -r {first}"
    assert f"reference: {kept}" in caplog.messages
    caplog.clear()
    cache(None, prepared_in(tmp_path, data), **changes)
    assert not caplog.text
    assert files_in(first) == before
    assert files_in(second) != before


def test_a_full_disk_is_named_and_leaves_nothing(disk):
    place, fill = disk
    store = Trees(some_documents(400, longest=30))
    prepared = SimpleNamespace(train=store, val=None, directory=place, info={"hash": "data"})
    model = model_of(1, torch.float32, dim=8, n_heads=2, max_seq_len=128)
    fill()
    with pytest.raises(ValueError, match=r"reference-.*: cannot be written: the (disk is full|file would)"):
        cache(model, prepared, seq_len=128, rows=16)
    assert not [path for path in place.iterdir() if "reference" in path.name]


def test_what_a_killed_process_has_left_is_cleared_away(tmp_path):
    model, prepared = model_of(1, torch.float32), prepared_in(tmp_path)
    path = cache(model, prepared)
    shutil.rmtree(path)
    mine = temporary_for(path.with_name(f"{path.name}.parts"))
    left = mine.with_name(mine.name.replace(f".{os.getpid()}.", ".999999999."))
    left.mkdir()
    cache(model, prepared)
    assert not left.exists()
    assert not list(tmp_path.glob(".reference*"))


def damage(path):
    file = path / "train.npy"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")


def cut(path):
    (path / "val.npy").write_bytes(b"")


def lose_the_index(path):
    (path / "index.json").unlink()


def swap_for_another(path):
    index = json.loads((path / "index.json").read_text())
    index["made_from"]["weights"] = "others"
    (path / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("harm", [damage, cut, lose_the_index, swap_for_another])
def test_what_is_damaged_or_not_what_its_name_says_is_computed_again(tmp_path, caplog, harm):
    model = model_of(1, torch.float32)
    path = cache(model, prepared_in(tmp_path))
    before = files_in(path)
    harm(path)
    caplog.set_level("INFO")
    assert cache(model, prepared_in(tmp_path)) == path
    assert files_in(path) == before
    assert ("is of other weights" if harm is swap_for_another else "is damaged") in caplog.text
    caplog.clear()
    cache(None, prepared_in(tmp_path))
    assert not caplog.text


def test_a_template_is_a_part_of_what_was_computed(tmp_path):
    """Of pairs as they are prepared for training."""
    tokenizer, model = (
        ByteTokenizer(),
        model_of(1, torch.float32, vocab_size=ByteTokenizer().vocab_size, max_seq_len=128),
    )
    rows = [{"prompt": f"what is {n}?", "chosen": f"{n} is {n}", "rejected": "a number"} for n in range(40)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    config = PreferencesConfig(path=[str(tmp_path / "pairs.json")], cache_dir=str(tmp_path / "cache"), seq_len=128)
    paths = set()
    for name in ("chatml", "zephyr"):
        (source,) = open_preferences(config, PairsConfig(), TEMPLATES[name], tokenizer)
        paths.add(cache(model, source.prepared, seq_len=128))
        for store in (source.prepared.train, source.prepared.val):
            for batch in eval_batches(store, 128, True, 2):
                with torch.no_grad():
                    expected = target_logprobs(model, batch)
                torch.testing.assert_close(batch.reference, expected, rtol=1e-5, atol=1e-5)
                assert batch.reference.any()
        verify(source.prepared.directory)  # which does not mind what stands beside
    assert len(paths) == 2


# --- what is said -----------------------------------------------------------------------------------------------------


def row(step, chosen, margin, **more):
    figures = {"logprobs_chosen": chosen, "length_chosen": 10.0, "reference_logprobs_chosen": -20.0}
    return {"step": step, **figures, "rewards_chosen": margin, "rewards_rejected": 0.0, **more}


def watched(rows, metrics=None):
    watch = FallingChosen(metrics, "advice")
    watch.begin(0)
    for one in rows:
        watch.write(one)


def test_chosen_answers_that_become_less_likely_while_the_margin_grows_are_reported_once(caplog):
    watched(row(step, -20 - step / 10, step / 100) for step in range(100))
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("step 15: the margin grows (0.105), and yet the chosen answers become less likely")
    assert "0.90 of the probability" in said
    assert said.endswith("advice")


@pytest.mark.parametrize(
    "rows",
    [
        [row(step, -20 + step / 10, step / 100) for step in range(100)],
        [row(step, -20 - step / 10, -step / 100) for step in range(100)],
        [row(step, -20 + (-1) ** step * 3, 0.1) for step in range(100)],
        [row(step, -40, 0.1) for step in range(3)],
        [{"step": step, "loss": 1.0} for step in range(100)],
        [row(step, -20 - step / 10, step / 100) | {"logprobs_chosen": None} for step in range(100)],
    ],
    ids=["more likely", "no margin", "up and down", "too few rows", "another objective", "no chosen answers"],
)
def test_nothing_is_reported_without_reason(caplog, rows):
    watched(rows)
    assert not caplog.records


def test_without_a_reference_chosen_answers_are_compared_with_the_first_rows(caplog):
    rows = [row(step, -30 - step / 10, 1 + step / 100) for step in range(100)]
    for one in rows:
        one.pop("reference_logprobs_chosen")
    watched(rows[:10])
    assert not caplog.records
    watched(rows)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("reference", [True, False])
def test_a_run_that_goes_on_is_warned_as_if_it_had_not_stopped(tmp_path, caplog, reference):
    """Of the rows that it wrote before some are what answers are compared with, and some have been reported."""
    rows = [row(step, -20 - step / 10, step / 100) for step in range(40)]
    if not reference:
        rows = [{name: value for name, value in one.items() if not name.startswith("reference")} for one in rows]
    watched(rows)
    (uninterrupted,) = caplog.messages
    caplog.clear()
    metrics = tmp_path / "metrics.jsonl"
    for cut in (4, 12):
        metrics.write_text("".join(json.dumps(one) + "\n" for one in rows[:cut]))
        watched(rows[cut:], metrics)
        assert caplog.messages == [uninterrupted]
        caplog.clear()
    metrics.write_text("".join(json.dumps(one) + "\n" for one in rows[:30]))
    watched(rows[30:], metrics)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("loss", "arguments", "said"),
    [
        ("dbo", {}, "'dbo' is not known"),
        (
            "dpo",
            {"gamma": 1.0, "reference": cached},
            "gamma: has no effect on the loss dpo, which takes beta, label_sm",
        ),
        ("dpo", {}, "compares with a reference; give one"),
        ("simpo", {"reference": cached}, "has no reference; leave it out"),
    ],
)
def test_what_does_not_fit_a_loss_is_refused(loss, arguments, said):
    with pytest.raises(ValueError, match=said):
        Preference(loss, **arguments)


@pytest.mark.parametrize(("loss", "weight"), [("dpo", 0.2), ("kto", 0.0), ("orpo", 1.0)])
def test_the_usual_loss_on_chosen_answers_joins_what_is_minimised_and_not_what_is_reported(loss, weight):
    model, batch = model_of(), Trees(documents_for(loss)).batch(48)
    loss_sum, metrics = Preference(loss, reference_for(loss, model_of(1)))(model, batch)
    sft_loss, tokens = metrics.get("sft_loss", (0.0, 1))
    units = Preference(loss, reference_for(loss, model_of(1))).count(batch)
    reported = metrics["loss"][0].item() + weight * units * float(sft_loss / tokens)
    assert loss_sum.item() == pytest.approx(reported, rel=1e-6)


def test_rows_that_are_no_preferences_are_refused():
    batch = Trees(documents_for("dpo")).batch(48)._replace(branches=None)
    with pytest.raises(ValueError, match="learns from preferences alone"):
        Preference("simpo").count(batch)


def test_training_prefers_the_chosen_answers():
    model, batch = model_of(dtype=torch.float32), Trees(documents_for("dpo")).batch(48)
    objective = Preference("dpo", Frozen(copy.deepcopy(model)), sft_weight=0.2)
    trainer = trainer_of(model, objective, batch.rows(0, 1), batch.rows(1, len(batch.tokens)))
    figures = [trainer.step() for _ in range(15)]
    assert figures[-1]["preference_accuracy"] == 1.0
    assert figures[-1]["logprobs_chosen"] > figures[0]["logprobs_chosen"]
    assert figures[-1]["loss"] < 0.5 < figures[0]["loss"]
