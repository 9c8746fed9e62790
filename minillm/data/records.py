"""Rows of a file with all their fields: .jsonl, .json and .csv, packed as .gz or not, and .parquet."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from minillm.data.json_rows import json_list_rows, jsonl_rows
from minillm.data.tables import ROWS, csv_fields, opened_parquet
from minillm.data.text import BLOCK, MAX_ROW, decoded, opened, raw_blocks, text_format

Records = Iterator[tuple[list[int], list[object]]]  # (lines, rows): some at a time, a row mostly a dict of its fields


def records(path: str | Path) -> Records:
    """The rows of a file, with the line where each begins (of .parquet its number).

    Raises ValueError naming file and line where it cannot be read.
    """
    kind, name = text_format(path), str(path)
    if kind == "txt":
        raise ValueError(f"{path}: plain text has no rows with fields; .jsonl, .json, .csv or .parquet is expected")
    with opened(path) as (file, packed):
        match kind:
            case "jsonl":
                for block in raw_blocks(name, file, packed, "row"):
                    yield jsonl_rows(decoded(block), name, block.line)
            case "json":
                yield from json_list_rows(name, file, BLOCK, MAX_ROW)
            case "csv":
                yield from csv_records(name, file)
            case "parquet":
                yield from parquet_records(name, file)


def csv_records(name: str, file: BinaryIO) -> Records:
    rows = csv_fields(name, file)
    _, header = next(rows, (0, []))
    for line, fields in rows:
        yield [line], [dict(zip(header, fields))]


def parquet_records(name: str, file: BinaryIO) -> Records:
    number = 1
    with opened_parquet(name, file) as (_, table):
        for batch in table.iter_batches(ROWS, use_threads=False):
            yield list(range(number, number + batch.num_rows)), batch.to_pylist()
            number += batch.num_rows
