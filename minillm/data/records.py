"""Rows of a file with all their fields: .jsonl, .json and .csv, packed as .gz or not, and .parquet."""

from collections.abc import Iterator
from pathlib import Path

from minillm.data.json_rows import json_list_rows, jsonl_rows
from minillm.data.tables import ROWS, csv_fields, opened_parquet
from minillm.data.text import BLOCK, MAX_ROW, decoded, opened, raw_blocks, text_format

Records = Iterator[
    tuple[int, object]
]  # (line, row), a row mostly a dict of its fields; a line of .jsonl may be NotJSON


def records(path: str | Path) -> Records:
    """The rows of a file, each with the line where it begins (of .parquet its number).

    Raises ValueError naming file and line where it cannot be read.
    """
    kind, name = text_format(path), str(path)
    if kind == "txt":
        raise ValueError(f"{path}: plain text has no rows with fields; .jsonl, .json, .csv or .parquet is expected")
    with opened(path) as (file, packed):
        match kind:
            case "jsonl":
                for block in raw_blocks(name, file, packed, "row"):
                    yield from zip(*jsonl_rows(decoded(block), name, block.line, strict=False))
            case "json":
                for lines, rows in json_list_rows(name, file, BLOCK, MAX_ROW):
                    yield from zip(lines, rows)
            case "csv":
                rows = csv_fields(name, file)
                _, header = next(rows, (0, []))
                for line, fields in rows:
                    yield line, dict(zip(header, fields))
            case "parquet":
                with opened_parquet(name, file) as (_, table):
                    batches = table.iter_batches(ROWS, use_threads=False)
                    yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
