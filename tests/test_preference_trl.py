"""The loss and its gradients are those of TRL's trainers, on the same model and the same pairs, in float64.

Their code is called as it is, on rows padded as theirs are, with a prompt a row for each answer; ours on packed trees.
"""

import copy
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from families import make
from preferences import Trees, some_documents, unpaired

import minillm
from minillm.preference import Frozen, Preference

SFT_WEIGHT = 0.3


class AsTheirs(torch.nn.Module):
    """A model as TRL's trainers call it; log-probabilities in float64, where its fused head makes them in fp32."""

    def __init__(self, model):
        super().__init__()
        self.model, self.is_gradient_checkpointing = model, False

    def forward(self, input_ids, attention_mask=None, labels=None, fused_lm_head=False, **_):
        logits = self.model(input_ids, attention_mask=attention_mask).logits
        if not fused_lm_head:
            return SimpleNamespace(logits=logits)
        targets = labels[:, 1:]
        logprobs = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        logprobs = logprobs * (targets != -100)
        logged = dict.fromkeys(("entropy", "mean_logits"), 0 * logprobs.detach())
        return SimpleNamespace(log_probs=logprobs, **logged, is_top1=logprobs > 0)


def their_trainer(kind, model, reference, **settings):
    """One of their trainers as far as its loss needs it; what they only log of it is kept from them."""
    trainer = object.__new__(kind)
    gather = {name: lambda tensor: tensor for name in ("gather", "gather_for_metrics")}
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"), **gather)
    trainer.model, trainer.ref_model = AsTheirs(model), AsTheirs(reference)
    trainer.args = SimpleNamespace(gradient_checkpointing_kwargs=None)
    vars(trainer).update(
        settings, aux_loss_enabled=False, precompute_ref_logps=False, _total_train_tokens=0, _tp_size=1
    )
    trainer._metrics = {"train": defaultdict(list)}
    return trainer


def padded(texts):
    """(tokens, mask) of texts of different lengths, as rows."""
    tokens = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
    return tokens, mask


def their_rows(documents, branch):
    """Tokens, mask, and mask of the answer, of a branch of each document."""
    tokens, mask = padded([prompt + answers[branch] for prompt, answers in documents])
    answered = mask.clone()
    for row, (prompt, _) in enumerate(documents):
        answered[row, : len(prompt)] = 0
    return tokens, mask, answered


def their_dpo(losses, documents, model, reference):
    from trl import DPOTrainer

    both = [(prompt, {1: answers[branch]}) for branch in (1, 2) for prompt, answers in documents]
    tokens, mask, answered = their_rows(both, 1)
    settings = {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "loss_types": losses,
        "loss_weights": [1.0, SFT_WEIGHT][: len(losses)],
    }
    settings |= {"ld_alpha": None, "f_divergence_type": "reverse_kl", "use_weighting": False}
    trainer = their_trainer(DPOTrainer, model, reference, **settings)
    inputs = {"input_ids": tokens, "attention_mask": mask, "completion_mask": answered}
    return trainer._compute_loss(trainer.model, inputs, False)


def their_kto(documents, model, reference):
    from trl import KTOTrainer

    settings = {"beta": 0.1, "desirable_weight": 1.2, "undesirable_weight": 0.8, "loss_type": "kto"}
    trainer = their_trainer(KTOTrainer, model, reference, **settings, calculate_KL=True)
    own = [(prompt, {1: answers[min(answers)]}) for prompt, answers in documents]
    inputs = dict(zip(("input_ids", "attention_mask", "completion_mask"), their_rows(own, 1)))
    inputs |= dict(zip(("KL_input_ids", "KL_attention_mask", "KL_completion_mask"), their_rows(documents, 3)))
    inputs["label"] = torch.tensor([1 in answers for _, answers in documents])
    return trainer._compute_loss(trainer.model, inputs, False)


def their_pairs(kind, documents, model, **settings):
    """The loss of those of their trainers that have no reference."""
    shared = {"is_encoder_decoder": False, "pad_token_id": 0, "padding_value": 0, "label_smoothing": 0.0, "alpha": 0.0}
    trainer = their_trainer(kind, model, model, **shared | settings)
    batch = {}
    for branch, name in ((1, "chosen"), (2, "rejected")):
        tokens, mask, answered = their_rows(documents, branch)
        batch |= {f"{name}_input_ids": tokens, f"{name}_attention_mask": mask}
        batch[f"{name}_labels"] = tokens.masked_fill(answered == 0, -100)
    return trainer.get_batch_loss_metrics(trainer.model, batch)[0]


def their_simpo(documents, model, reference):
    from trl.experimental.cpo import CPOTrainer

    return their_pairs(CPOTrainer, documents, model, loss_type="simpo", beta=2.0, simpo_gamma=1.0, cpo_alpha=0.0)


def their_orpo(documents, model, reference):
    from trl.experimental.orpo import ORPOTrainer

    loss = their_pairs(ORPOTrainer, documents, model, beta=0.1)
    tokens, mask, _ = their_rows(
        documents, 1
    )  # their SFT term is of prompt and answer; ours, tested above, of the answer
    logits = model(tokens, attention_mask=mask).logits[:, :-1]
    targets = tokens.masked_fill(mask == 0, -100)[:, 1:]
    return loss - torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def their_cpo(documents, model, reference):
    from trl.experimental.cpo import CPOTrainer

    settings = {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.2, "cpo_alpha": SFT_WEIGHT}
    return their_pairs(CPOTrainer, documents, model, **settings)


def nothing(policy, batch):
    """A reference that has no opinion, with which DPO is CPO."""
    return torch.zeros(batch.tokens.shape)


CASES = {  # theirs; ours
    "dpo": (partial(their_dpo, ["sigmoid"]), ("dpo", {"sft_weight": 0.0})),
    "dpo with an sft term": (partial(their_dpo, ["sigmoid", "sft"]), ("dpo", {"sft_weight": SFT_WEIGHT})),
    "conservative dpo": (
        their_cpo,
        ("dpo", {"sft_weight": SFT_WEIGHT, "label_smoothing": 0.2, "reference": nothing}),
    ),
    "hinge": (partial(their_dpo, ["hinge"]), ("hinge", {"sft_weight": 0.0})),
    "ipo": (partial(their_dpo, ["ipo"]), ("ipo", {"sft_weight": 0.0})),
    "kto": (their_kto, ("kto", {"desirable_weight": 1.2, "undesirable_weight": 0.8})),
    "orpo": (their_orpo, ("orpo", {"sft_weight": 0.0})),
    "simpo": (their_simpo, ("simpo", {"sft_weight": 0.0})),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(theirs, ours) of a policy and of a reference."""
    pytest.importorskip("trl", reason="trl is not installed: extra bench")
    found = []
    for seed in (0, 1):
        theirs, folder = make("llama"), tmp_path_factory.mktemp("model")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        theirs.save_pretrained(folder)
        found.append((theirs.double(), minillm.load(folder)[0].double().train()))
    return found


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_trl(models, case):
    theirs, (name, options) = CASES[case]
    # the other way round where a policy that finds other answers less likely than the reference has a KL of 0
    (their_policy, policy), (their_reference, reference) = models[::-1] if name == "kto" else models
    documents = some_documents(7, unpaired if name == "kto" else (1, 2))
    expected = theirs(documents, their_policy, their_reference)

    if name in ("dpo", "hinge", "ipo", "kto"):
        options = {"reference": Frozen(copy.deepcopy(reference))} | options
    objective, batch = Preference(name, **options), Trees(documents).batch(48)
    objective = objective.prepare(policy, [batch], lambda tensor: tensor)
    loss_sum, metrics = objective(policy, batch)
    assert name != "kto" or metrics["kto_kl"][0] > 0.1
    loss = loss_sum / objective.count(batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    theirs_by_name = dict(their_policy.named_parameters())
    gradients = torch.autograd.grad(loss, [policy.embed.weight, policy.lm_head.weight])
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    for ours, wanted in zip(gradients, torch.autograd.grad(expected, [theirs_by_name[name] for name in names])):
        found = ours[: len(wanted)]  # without padding
        # their odds of ORPO are made in fp32
        assert (found - wanted).norm() / wanted.norm() < (1e-5 if case == "orpo" else 1e-6)
