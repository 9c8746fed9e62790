"""All that is known of a run before it is begun, as one JSON-able object, and as tables."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from minillm.memory import GIB
from minillm.plan import count_parameters, flops_per_token, optimal_tokens
from minillm.simulate.candidates import Candidate, candidates, suggest
from minillm.simulate.config import Plan, completed_run, tokens_of

PARTS = ("weights", "gradients", "moments", "activations", "logits", "buffers", "peak")
TOKENS = {
    "hoffmann": "Hoffmann et al. 2022, approach 1 (table 3)",
    "hoffmann_parametric": "Hoffmann et al. 2022, approach 3 (eq. 4 and 10)",
    "kaplan": "Kaplan et al. 2020, appendix A (embeddings left out)",
}


def simulate(plan: Plan) -> dict[str, Any]:
    """What the run takes, each way to lay it out, and the one that is suggested, None where none fits."""
    run = completed_run(plan)
    count = count_parameters(run.model)
    optimal = optimal_tokens(count, run.model)
    tokens, by = tokens_of(plan, run, optimal.hoffmann)
    flops = flops_per_token(run.model, run.seq_len, run.adapt)
    found = candidates(plan, run)
    best = suggest(found)
    steps = -(-tokens // run.batch_tokens)
    said = None
    if best:
        hours = best.seconds * steps / 3600
        said = {
            **row(best),
            "toml": toml(best),
            "hours": hours,
            "gpu_hours": hours * plan.gpus,
            "cost": plan.price and hours * plan.gpus * plan.price,
            "tokens_per_second": run.batch_tokens / best.seconds,
            "mfu": run.batch_tokens * flops / (best.seconds * plan.gpus * plan.peak_of_gpu),
        }
    return {
        "assumed": list(run.assumed),
        "parameters": dataclasses.asdict(count),
        "gpus": plan.gpus,
        "gpu": {"name": plan.gpu, "memory_gib": plan.memory_of_gpu, "peak_flops": plan.peak_of_gpu},
        "seq_len": run.seq_len,
        "batch_tokens": run.batch_tokens,
        "precision": run.precision,
        "optimal_tokens": dataclasses.asdict(optimal),
        "tokens": tokens,
        "tokens_by": by,
        "steps": steps,
        "flops_per_token": flops,
        "flops": flops * tokens,
        "layouts": [row(one) for one in found],
        "suggested": said,
    }


def row(one: Candidate) -> dict[str, Any]:
    """A layout as JSON has it."""
    setting = one.setting
    return {
        "name": one.name,
        **dataclasses.asdict(one.layout),
        "reshard_after_forward": setting.reshard_after_forward,
        "micro_batch_size": setting.rows,
        "activation_checkpointing": setting.activation_checkpointing,
        "memory": dataclasses.asdict(one.memory),
        "fits": one.fits,
        "sent_bytes": one.sent,
        "step_seconds": one.seconds,
    }


def toml(one: Candidate) -> str:
    """The lines of a config file that ask for a layout."""
    lines = ["[parallel]", f'strategy = "{one.layout.strategy}"']
    if one.layout.strategy == "hsdp":
        lines += [f"dp_replicate = {one.layout.dp_replicate}", f"dp_shard = {one.layout.dp_shard}"]
    if one.layout.strategy != "ddp":
        lines += [f"reshard_after_forward = {str(one.setting.reshard_after_forward).lower()}"]
    lines += [f"tp = {one.layout.tp}", ""]
    if one.layout.tp > 1:
        lines += ["[model]", f"vocab_multiple = {one.vocab_multiple}", ""]
    lines += ["[train]", f"micro_batch_size = {one.setting.rows}"]
    return "\n".join([*lines, f'activation_checkpointing = "{one.setting.activation_checkpointing}"'])


# --- tables -----------------------------------------------------------------------------------------------------------


def report(found: dict[str, Any]) -> str:
    """What `simulate` found, for a terminal."""
    count, gpu, best = found["parameters"], found["gpu"], found["suggested"]
    facts = [
        ("parameters", f"{count['total']:,}, {count['matmul']:,} of them in matrix products"),
        ("operations", f"{found['flops_per_token']:.3g} a token, {found['flops']:.3g} in all"),
        ("step", f"{found['batch_tokens']:,} tokens in rows of {found['seq_len']:,}, {found['precision']}"),
        ("tokens", f"{found['tokens']:,} ({found['tokens_by']}), {found['steps']:,} steps"),
        *(
            ("" if i else "optimal", f"{found['optimal_tokens'][key]:.3g}  {source}")
            for i, (key, source) in enumerate(TOKENS.items())
        ),
        ("GPUs", f"{found['gpus']} x {gpu['name']}, {gpu['memory_gib']:g} GiB, {gpu['peak_flops'] / 1e12:g} TFLOP/s"),
    ]
    if found["assumed"]:
        facts.append(("assumed", ", ".join(found["assumed"])))
    lines = [f"{name:<12}{value}" for name, value in facts]
    lines += [
        "",
        "each strategy at its fastest that fits, else at its smallest; GiB a GPU by estimate, not all at once;",
        "sent: GB a GPU a step",
    ]
    lines += table(best_of_each(found["layouts"]), best)
    if best is None:
        least = min(found["layouts"], key=lambda one: one["memory"]["peak"])
        return "\n".join(
            [*lines, "", f"nothing fits: the least takes {least['memory']['peak'] / GIB:.3g} GiB ({least['name']})"]
        )
    modes = [one for one in found["layouts"] if same(one, best, "name", "micro_batch_size")]
    lines += ["", f"{best['name']} with each activation checkpointing", *table(modes, best)]
    cost = f", cost {best['cost']:,.0f}" if best["cost"] else ""
    lines += [
        "",
        f"suggested   {best['name']}: {best['step_seconds']:.3g} s a step, {best['tokens_per_second']:,.0f} tokens/s, "
        f"MFU {100 * best['mfu']:.0f}%",
        f"            {best['hours']:,.3g} hours, {best['gpu_hours']:,.4g} GPU hours{cost}",
        "",
        best["toml"],
    ]
    return "\n".join(lines)


def same(one: dict[str, Any], other: dict[str, Any], *keys: str) -> bool:
    return all(one[key] == other[key] for key in keys)


def best_of_each(layouts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each strategy on its own, and of each with tensor parallelism, the fastest that fits, else the smallest."""

    def rank(one: dict[str, Any]) -> tuple:
        return (0, one["step_seconds"]) if one["fits"] else (1, one["memory"]["peak"])

    found: dict[tuple, dict[str, Any]] = {}
    for one in layouts:
        key = (one["strategy"], one["reshard_after_forward"], one["tp"] > 1)
        if key not in found or rank(one) < rank(found[key]):
            found[key] = one
    return [found[key] for key in sorted(found, key=lambda key: key[2])]


def table(rows: Sequence[dict[str, Any]], best: dict[str, Any] | None) -> list[str]:
    """Aligned columns; a star marks the suggested row."""
    head = ["", "layout", "rows", "recomputed", *PARTS, "fits", "sent", "s/step"]
    cells = [head]
    for one in rows:
        star = "*" if best and same(one, best, "name", "micro_batch_size", "activation_checkpointing") else ""
        parts = [f"{one['memory'][part] / GIB:.1f}" for part in PARTS]
        mode, rows_ = one["activation_checkpointing"], str(one["micro_batch_size"])
        fits = "yes" if one["fits"] else "no"
        sent = f"{one['sent_bytes'] / 1e9:.1f}"
        cells.append([star, one["name"], rows_, mode, *parts, fits, sent, f"{one['step_seconds']:.3g}"])
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    left = (0, 1, 3)
    return [
        "  ".join(f"{text:<{w}}" if i in left else f"{text:>{w}}" for i, (text, w) in enumerate(zip(line, widths)))
        for line in cells
    ]
