"""The first half of cleaning: each document by itself, so by any number of processes and machines.

    blocks --> groups: whole documents --> workers: edit, rules, contamination --> rows, dropped rows, counts
                                                    \\--> hashes and signatures, for the search for duplicates

A document longer than a block comes in several, which are joined; of one that is longer than `clean.max_bytes` the
middle is let go, since it is dropped anyway.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minillm.data.clean.config import CleanConfig
from minillm.data.clean.contamination import NgramIndex, contaminated
from minillm.data.clean.duplicates import text_hashes
from minillm.data.clean.filters import Page, first_failed, line_rules, thresholds, without_lines
from minillm.data.clean.minhash import signatures
from minillm.data.clean.normalise import normalise
from minillm.data.clean.privacy import redact
from minillm.data.clean.report import Report
from minillm.data.config import TextConfig
from minillm.data.text import MAX_ROW, Block, blocks, texts_of

# What is remembered of a document that passed: the hash of its words, its bytes before and after, and where it stands.
RECORD = np.dtype([("hash", "<u8"), ("read", "<u4"), ("written", "<u4"), ("file", "<u4"), ("line", "<u8")])


class Group(NamedTuple):
    """Consecutive blocks that begin and end with whole documents: one block, or those that a long document spans."""

    blocks: list[Block]
    file: int  # number of its file
    n_let_go: int  # bytes of its first document that are not in the blocks
    end: int  # bytes of the corpus up to its end


class Sifted(NamedTuple):
    """What is left of a group."""

    rows: list[bytes]  # lines of JSON
    records: np.ndarray
    signatures: np.ndarray  # (rows, permutations) uint32, or nothing
    dropped: list[bytes]  # lines of JSON, where they are asked for
    report: Report
    end: int


class Passed(NamedTuple):
    """A document that no rule has dropped so far."""

    line: int
    text: str
    n_bytes: int
    edits: Counter[str]


def groups(blocks: Iterable[tuple[Block, int, int]], most: int) -> Iterator[Group]:
    """Blocks, each with the number of its file and its end in the corpus, in groups.

    Of a document of more than `most` bytes the blocks inside it are emptied.
    """
    group: list[Block] = []
    held = let_go = 0
    for block, file, end in blocks:
        size = len(block.raw)
        if group and not block.ends and held + size > most:
            let_go += size
            block = block._replace(raw=b"")
        held += len(block.raw)
        group.append(block)
        if block.ends:
            yield Group(group, file, let_go, end)
            group, held, let_go = [], 0, 0


def whole_documents(group: Group, data: TextConfig) -> Iterator[tuple[int, str]]:
    """(line, text) of each document of a group, "" for blank ones."""
    begun, parts = 0, []
    for block in group.blocks:
        lines, texts = texts_of(block, data)
        for i, (line, text) in enumerate(zip(lines, texts)):
            if i > 0 or block.starts:
                begun, parts = line, []
            parts.append(text)
            if i + 1 < len(texts) or block.ends:
                yield begun, parts[0] if len(parts) == 1 else "".join(parts)


def whole_texts(files: Iterable[str | Path], data: TextConfig) -> Iterator[tuple[str, str]]:
    """(file:line, text) of the whole documents of files that fit into memory one document at a time."""
    for file in files:
        for group in groups(((block, 0, 0) for block in blocks(file, data)), MAX_ROW):
            for line, text in whole_documents(group, data):
                yield f"{file}:{line}", text


def sift(data: TextConfig, config: CleanConfig, tests: NgramIndex | None, n_perm: int, group: Group) -> Sifted:
    """Edit and judge the documents of a group. Raises ValueError naming file and line for what cannot be read."""
    report, dropped = Report(), []
    file = group.blocks[0].file
    limits, lines_out = thresholds(config), line_rules(config)

    def drop(document: Passed, rule: str, value: object) -> None:
        source = f"{file}:{document.line}"
        report.drop(rule, document.n_bytes, source, value)
        if config.keep_dropped:
            dropped.append(row(document.text, source, rule=rule, value=value))

    passed: list[Passed] = []
    for number, (line, text) in enumerate(whole_documents(group, data)):
        size = len(text.encode()) + (group.n_let_go if number == 0 else 0)
        report.read(size)
        document = Passed(line, text, size, Counter())
        if size > config.max_bytes:
            drop(document, "max_bytes", size)
            continue
        document = edited(document, config, lines_out)
        page = Page(document.text, config, as_read=text)
        failed = first_failed(page, limits) if page.words else ("empty", 0)
        if failed:
            drop(document, *failed)
        else:
            passed.append(document)
    if tests is not None:
        found = {place: test for place, test, _ in contaminated([d.text for d in passed], tests, config.against_share)}
        for place, test in found.items():
            drop(passed[place], "contamination", test)
        passed = [document for place, document in enumerate(passed) if place not in found]
    rows, texts = [], []
    records = np.zeros(len(passed), RECORD)
    for record, document in zip(records, passed):
        text, replaced = redact(document.text, config.privacy, config.placeholder)
        texts.append(text)
        rows.append(row(text, f"{file}:{document.line}"))
        written = len(text.encode())
        report.keep(document.n_bytes, written, document.edits + replaced)
        record["read"], record["written"], record["line"] = document.n_bytes, written, document.line
    records["hash"], records["file"] = text_hashes(texts), group.file
    marks = signatures(texts, n_perm) if n_perm else np.empty((len(texts), 0), np.uint32)
    return Sifted(rows, records, marks, dropped, report, group.end)


def edited(document: Passed, config: CleanConfig, lines_out: list[str]) -> Passed:
    """A document in one spelling and without the lines that the rules about lines remove."""
    text = normalise(document.text, config.unicode, config.spaces)
    edits = Counter({"normalised": int(text != document.text)})
    if lines_out:
        text, removed = without_lines(text, lines_out, config)
        edits += removed
        if removed and config.spaces:
            text = normalise(text, "none")  # blank lines that have come together
    return document._replace(text=text, edits=+edits)


def row(text: str, source: str, **more: object) -> bytes:
    """A line of JSON."""
    return (json.dumps({"text": text, "source": source, **more}, ensure_ascii=False) + "\n").encode()
