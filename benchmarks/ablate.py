"""Trains every variant that a config of configs/ablations/ lists, one after the other, and makes a table of them.

    python benchmarks/ablate.py configs/ablations/learning_rate.toml [MORE.toml ...] [--seeds 0 1 2] [--runs DIR]

Such a config names a base, which is a config of train.py, and what varies over it:

    base = "base.toml"                            # beside the file

    [[vary]]                                      # 2 x 2 runs
    "optim.name" = ["adamw", "lamb"]
    "optim.lr" = [1e-3, 1e-2]

    [[vary]]                                      # and one more
    "optim.name" = "sgd"
    "optim.lr" = 0.3

A list stands for each of its values in turn, and lists are combined each with each. A run is a `train.py` of its own,
in DIR/ABLATION/VARIANT; one that is finished is not repeated and one that was stopped goes on, so the same command
continues a series that was interrupted. The table is printed and kept in DIR/ABLATION.md: the loss of each variant on
the text held out (mean over the seeds, and half the distance between the best and the worst), the lowest in bold.
"""

import argparse
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent

Values = dict[str, Any]  # dotted names of fields, as on the command line


class Ablation(NamedTuple):
    """A config read: its name, the base's file, and the fields of each variant beside it."""

    name: str
    base: Path
    variants: list[Values]


def read_ablation(path: Path) -> Ablation:
    """The variants that a file lists, in its order. Raises ValueError for a file that is no ablation."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if unknown := sorted(content.keys() - {"base", "vary"}):
        raise ValueError(f"{path}: {unknown[0]} is not known here; base and vary are (quote dotted names)")
    base = path.parent / str(content.get("base", ""))
    if not base.is_file():
        raise ValueError(f"{path}: base: {base} is no file; name a config of train.py beside this one")
    tables = content.get("vary")
    if not isinstance(tables, list) or not tables:
        raise ValueError(f"{path}: vary: nothing varies; add a table [[vary]]")
    return Ablation(path.stem, base, [variant for table in tables for variant in combinations(table)])


def combinations(table: Values) -> list[Values]:
    """{"a": [1, 2], "b": 3} -> [{"a": 1, "b": 3}, {"a": 2, "b": 3}]"""
    lists = [value if isinstance(value, list) else [value] for value in table.values()]
    return [dict(zip(table, values)) for values in itertools.product(*lists)]


def run_directory(runs: Path, ablation: Ablation, variant: Values, seed: int) -> Path:
    """Where a variant trains: a place of its own for each content of the base, so that no result is out of date."""
    words = [f"{name}={value}".replace("/", "_") for name, value in {**variant, "run.seed": seed}.items()]
    digest = hashlib.sha256(ablation.base.read_bytes()).hexdigest()[:8]
    return runs / ablation.name / ",".join([*words, digest])


def train(directory: Path, base: Path, variant: Values, seed: int) -> str | None:
    """Train one variant to its end, unless it is there already; returns what went wrong, if anything did."""
    summary = directory / "summary.json"
    if summary.exists() and json.loads(summary.read_text(encoding="utf-8"))["finished"]:
        return None
    options = {**variant, "run.seed": seed, "run.dir": directory, "run.resume": "auto"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(ROOT / "train.py"), str(base), *words]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return None if json.loads(summary.read_text(encoding="utf-8"))["finished"] else "stopped"


# --- the table --------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What came out of a variant, over its seeds."""

    variant: Values
    val_loss: float | None  # None where no run of it came to its end
    spread: float
    parameters: int
    minutes: float


def collect(variant: Values, directories: list[Path]) -> Result:
    """The result of a variant from the summaries of its runs."""
    found = [json.loads((one / "summary.json").read_text()) for one in directories if (one / "summary.json").exists()]
    found = [summary for summary in found if summary["finished"]]
    losses = [summary["val_loss"] for summary in found]
    if not losses:
        return Result(variant, None, 0.0, 0, 0.0)
    minutes = 60 * statistics.mean(summary["hours"] for summary in found)
    spread = (max(losses) - min(losses)) / 2
    return Result(variant, statistics.mean(losses), spread, found[0]["parameters"], minutes)


def make_table(results: list[Result], seeds: list[int]) -> str:
    """A row a variant, with a column for each field in which they differ; the same again for the best of each group.

    A group is what agrees in the first of several fields: for optimizers with a grid of learning rates, an optimizer.
    """
    names = list(dict.fromkeys(name for result in results for name in result.variant))
    names = [name for name in names if len({str(result.variant.get(name)) for result in results}) > 1]
    parts = [rows(results, names, seeds)]
    groups = {str(result.variant.get(names[0])) for result in results} if names else set()
    if len(names) > 1 and 1 < len(groups) < len(results):
        ordered = sorted((one for one in results if one.val_loss is not None), key=lambda one: one.val_loss)
        best = {str(one.variant.get(names[0])): one for one in reversed(ordered)}
        kept = [one for one in ordered if one is best[str(one.variant.get(names[0]))]]
        parts += [f"The best of each {names[0]}:", rows(kept, names, seeds)]
    return "\n\n".join(parts) + "\n"


def rows(results: list[Result], names: list[str], seeds: list[int]) -> str:
    lowest = min((one.val_loss for one in results if one.val_loss is not None), default=None)
    columns = [*names, "parameters", "minutes", "val loss"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for one in results:
        loss = "did not finish" if one.val_loss is None else f"{one.val_loss:.3f}"
        loss = f"**{loss}**" if one.val_loss is not None and one.val_loss == lowest else loss
        loss += f" ± {one.spread:.3f}" if len(seeds) > 1 and one.val_loss is not None else ""
        cells = [*(str(one.variant.get(name, "")) for name in names), f"{one.parameters:,}", f"{one.minutes:.1f}", loss]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG.toml")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"), help="where the runs are kept")
    options = parser.parse_args(argv)
    try:
        ablations = [read_ablation(path) for path in options.configs]  # all of them before the first run
    except ValueError as error:
        parser.error(str(error))
    failures = 0
    for ablation in ablations:
        results = []
        for number, variant in enumerate(ablation.variants, 1):
            directories = [run_directory(options.runs, ablation, variant, seed) for seed in options.seeds]
            for seed, directory in zip(options.seeds, directories):
                problem = train(directory, ablation.base, variant, seed)
                failures += problem is not None
                if problem:
                    print(f"{directory}: {problem}", flush=True)
            results.append(collect(variant, directories))
            shown = ", ".join(f"{name} {value}" for name, value in variant.items())
            print(f"{ablation.name} {number}/{len(ablation.variants)}: {shown}: {results[-1].val_loss}", flush=True)
        table = make_table(results, options.seeds)
        options.runs.mkdir(parents=True, exist_ok=True)
        (options.runs / f"{ablation.name}.md").write_text(table, encoding="utf-8")
        print(f"\n## {ablation.name}\n\n{table}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
