"""What became of every document: kept, or dropped by one rule; and what was edited. The sums add up, or it is a bug."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minillm.files import read_json, write_atomically

EXAMPLES = 5  # documents named for each rule
FORMAT = "minillm clean 1"  # what report.json begins with, by which `is_cleaned` knows it


@dataclass
class Dropped:
    """What one rule has dropped."""

    documents: int = 0
    n_bytes: int = 0
    examples: list[str] = field(default_factory=list)  # file:line, and the value that failed


@dataclass
class Report:
    """Counts of documents and of bytes of UTF-8, as read, but for those written."""

    documents: int = 0
    n_bytes: int = 0
    kept: int = 0
    kept_bytes: int = 0
    written_bytes: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)
    edits: dict[str, list[int]] = field(default_factory=dict)  # [documents, how often]
    skipped_tests: int = 0  # tests too short to be looked for

    def read(self, n_bytes: int) -> None:
        """Count a document."""
        self.documents += 1
        self.n_bytes += n_bytes

    def keep(self, n_bytes: int, written: int, edits: Mapping[str, int]) -> None:
        """Count a document that passed, its size before and after, and what was edited in it."""
        self.kept += 1
        self.kept_bytes += n_bytes
        self.written_bytes += written
        for name, times in edits.items():
            counts = self.edits.setdefault(name, [0, 0])
            counts[0] += 1
            counts[1] += times

    def drop(self, rule: str, n_bytes: int, source: str, value: object) -> None:
        """Count a document that a rule dropped."""
        dropped = self.dropped.setdefault(rule, Dropped())
        dropped.documents += 1
        dropped.n_bytes += n_bytes
        if len(dropped.examples) < EXAMPLES:
            dropped.examples.append(f"{source} ({shown(value)})")

    def drop_kept(self, rule: str, n_bytes: int, written: int, source: str, value: object) -> None:
        """Count a document as dropped that was counted as kept."""
        self.kept -= 1
        self.kept_bytes -= n_bytes
        self.written_bytes -= written
        self.drop(rule, n_bytes, source, value)

    def add(self, other: "Report") -> None:
        """Add the counts of documents that come after these."""
        for name in ("documents", "n_bytes", "kept", "kept_bytes", "written_bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for rule, dropped in other.dropped.items():
            mine = self.dropped.setdefault(rule, Dropped())
            mine.documents += dropped.documents
            mine.n_bytes += dropped.n_bytes
            mine.examples = (mine.examples + dropped.examples)[:EXAMPLES]
        for name, counts in other.edits.items():
            self.edits[name] = [a + b for a, b in zip(self.edits.get(name, [0, 0]), counts)]
        self.skipped_tests = max(self.skipped_tests, other.skipped_tests)

    def check(self) -> None:
        """Every document, and every byte, is accounted for once."""
        assert self.documents == self.kept + sum(dropped.documents for dropped in self.dropped.values()), self
        assert self.n_bytes == self.kept_bytes + sum(dropped.n_bytes for dropped in self.dropped.values()), self


def shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(report: Report) -> str:
    """The report for people, in Markdown."""
    rows = [("documents read", report.documents, report.n_bytes, "")]
    by_size = sorted(report.dropped.items(), key=lambda item: (-item[1].documents, item[0]))
    rows += [(rule, dropped.documents, dropped.n_bytes, dropped.examples[0]) for rule, dropped in by_size]
    rows += [("kept", report.kept, report.kept_bytes, f"{report.written_bytes:,} bytes after edits")]
    cells = [("", "documents", "share", "bytes", "for example")]
    total = max(1, report.documents)
    cells += [(name, f"{n:,}", f"{n / total:.1%}", f"{size:,}", example) for name, n, size, example in rows]
    lines = laid_out(cells, "<>>><")
    if report.edits:
        edits = sorted(report.edits.items(), key=lambda item: (-item[1][0], item[0]))
        edit_cells = [("edits", "documents", "times"), *((name, f"{n:,}", f"{k:,}") for name, (n, k) in edits)]
        lines += ["", *laid_out(edit_cells, "<>>")]
    if report.skipped_tests:
        tests = "1 test is" if report.skipped_tests == 1 else f"{report.skipped_tests:,} tests are"
        lines += ["", f"{tests} too short to be looked for."]
    return "\n".join(lines)


def laid_out(cells: list[tuple[str, ...]], sides: str) -> list[str]:
    """Rows of a Markdown table with columns of even width; `sides` has < or > for each."""
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(sides))]
    lines = [
        "| " + " | ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths)) + " |"
        for row in cells
    ]
    rule = "|".join("-" * (width + 1) + (":" if side == ">" else "-") for side, width in zip(sides, widths))
    return [lines[0], f"|{rule}|", *lines[1:]]


def save(report: Report, directory: Path, settings: Mapping[str, Any]) -> None:
    """Write report.json, with the settings, and report.md."""
    report.check()
    content = {"format": FORMAT, **settings, "report": asdict(report)}
    write_atomically(directory / "report.json", json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    write_atomically(directory / "report.md", table(report) + "\n")


def load(directory: Path) -> tuple[Report, dict[str, Any]]:
    """(the report of a directory, its settings). Raises ValueError where there is none."""
    content = read_json(directory / "report.json")
    if (found := content.pop("format", None)) != FORMAT:
        raise ValueError(f"{directory / 'report.json'}: format {found!r}; {FORMAT!r} is expected, so make it again")
    values = content.pop("report")
    values["dropped"] = {rule: Dropped(**dropped) for rule, dropped in values["dropped"].items()}
    return Report(**values), content
