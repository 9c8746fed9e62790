"""Rows of tables and the text in them: .csv, and .parquet through pyarrow (the extra `data`).

Both are read some rows at a time, so that memory is bounded by the largest row, and for parquet by the largest page,
and not by the file or its row groups.
"""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

MAX_LINE = 2**24  # bytes of a line of .csv, and characters of a field: 16 MiB, for which the parser takes 64
ROWS = 64  # of .parquet, decoded at a time
BUFFER = 2**20  # bytes of .parquet read at a time
OTHER_SEPARATORS = "\t;|"

Rows = Iterator[tuple[list[int], list[str]]]  # (numbers, texts): as many rows at a time as fill a batch


def csv_rows(name: str, file: BinaryIO, field: str, batch_size: int) -> Rows:
    """(lines, texts) of the rows after the header; lines without anything are no rows.

    Raises ValueError with the line where a row begins that is not like the header.
    """
    rows = csv_fields(name, file)
    line, header = next(rows, (0, []))
    column = column_of(header, field, f"{name}:{line}") if header else 0
    lines, texts, size = [], [], 0
    for line, fields in rows:
        lines.append(line)
        texts.append(fields[column])
        size += len(fields[column])
        if size >= batch_size:
            yield lines, texts
            lines, texts, size = [], [], 0
    if lines:
        yield lines, texts


def csv_fields(name: str, file: BinaryIO) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of the header and of every row after it."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))  # one for the whole process: only ever raised
    reader = csv.reader(csv_lines(name, file), strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{name}:{line}: not valid CSV: {error}") from None
        if row is None:
            return
        if len(row) < 2 and not "".join(row).strip():
            continue
        header = header or row
        if len(row) != len(header):
            raise ValueError(f"{name}:{line}: {len(row)} field{'s' * (len(row) > 1)}, expected {len(header)}")
        yield line, row


def csv_lines(name: str, file: BinaryIO) -> Iterator[str]:
    """The lines of a file. Raises ValueError with the line and the byte of what is not UTF-8."""
    line = offset = 0
    while raw := file.readline(MAX_LINE + 1):
        line += 1
        if len(raw) > MAX_LINE:
            raise ValueError(f"{name}:{line}: a line of more than {MAX_LINE:,} bytes; this is no table of text")
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            byte = offset + error.start
            raise ValueError(f"{name}:{line}: not UTF-8 at byte {byte}; convert the file to UTF-8") from None
        offset += len(raw)
        yield text.removeprefix("\ufeff") if line == 1 else text


def parquet_rows(name: str, file: BinaryIO, field: str, batch_size: int) -> Rows:
    """(numbers, texts) of the rows, of which the first is number 1; no other column is read.

    Raises ValueError where the column is not one of text, and for damaged files.
    """
    with opened_parquet(name, file) as (pyarrow, table):
        kind = table.schema_arrow.field(column_of(table.schema_arrow.names, field, name)).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
            raise ValueError(f'{name}: column "{field}" is {kind}; text is expected; set data.text_field')
        numbers, texts, size, number = [], [], 0, 0
        for batch in table.iter_batches(ROWS, columns=[field], use_threads=False):
            for text in column_texts(batch.column(0), name, number + 1, field):
                number += 1
                numbers.append(number)
                texts.append(text)
                size += len(text)
                if size >= batch_size:
                    yield numbers, texts
                    numbers, texts, size = [], [], 0
        if numbers:
            yield numbers, texts


@contextmanager
def opened_parquet(name: str, file: BinaryIO) -> Iterator[tuple]:
    """(the module pyarrow, the file opened by it). Raises ValueError where the data is damaged."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{name}: to read parquet, pyarrow is needed: pip install 'minillm[data]'") from None
    try:
        # With a buffer a column is read as it is decoded; without one, a row group at a time, however large.
        yield pyarrow, parquet.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        said = str(error).partition("\n")[0]
        raise ValueError(f"{name}: the parquet data is damaged or cut short: {said}") from None


def column_texts(column, name: str, first: int, field: str) -> list[str]:
    """The values of a pyarrow array of text, of which the first stands in row `first`."""
    try:
        texts = column.to_pylist()
    except UnicodeDecodeError:
        texts = [None]
    if None in texts:
        for number, value in enumerate(column, first):
            try:
                found = "null" if value.as_py() is None else ""
            except UnicodeDecodeError as error:
                found = f"not UTF-8 at byte {error.start}"
            if found:
                raise ValueError(f'{name}:{number}: column "{field}" is {found}; fix the row or leave it out')
    return texts


def column_of(names: list[str], field: str, place: str) -> int:
    """The number of the column that holds the text."""
    if names.count(field) != 1:
        what = "is there more than once" if field in names else "is missing"
        other = next((sign for sign in OTHER_SEPARATORS if len(names) == 1 and field in names[0].split(sign)), None)
        advice = f"separate columns by commas, not {other!r}" if other else "set data.text_field"
        raise ValueError(f'{place}: column "{field}" {what} (found: {", ".join(names)}); {advice}')
    return names.index(field)
