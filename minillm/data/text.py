"""Text files as a stream of documents, in bounded memory however long a file, a line or a document is.

A file is read in blocks of some MiB of raw bytes, cut where a document ends when one does. A block can then be parsed
on its own, by any process. A document larger than a piece comes in several, cut where the tokens are the same as
without the cut whenever there is such a place: before a single space between two words.

    file    ....................................   read in order, by one process
    blocks  |...........|...........|..........|   Block: raw bytes and where they stand
    pieces  |..|...|....|                          Document: text, where it stands, whether it starts or ends here

A row of JSON or of a table is the one thing that has to be held whole: at most MAX_ROW bytes of it.
"""

import difflib
import glob
import gzip
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from minillm.data.config import TextConfig
from minillm.data.json_rows import json_list_rows, jsonl_rows, row_texts
from minillm.data.store import is_cleaned, is_prepared
from minillm.data.tables import Rows, csv_rows, parquet_rows

BLOCK = 2**20  # bytes read at a time: 0.2 s of tokenising, so that a process is not kept waiting for its next one
PIECE = 2**14  # bytes: sentencepiece encodes pieces of 16 KiB three times as fast as one text of 1 MiB
MAX_ROW = 2**28  # bytes of one JSON row, 256 MiB
KINDS = ("txt", "jsonl", "json", "csv", "parquet")
FORMATS = ".txt, .jsonl, .json or .csv, one of these and .gz, or .parquet"
OTHER = ("dataset_info.json", "tokenizer.json", "tokenizer_config.json")  # no text, but found beside it
SPACES = b" \t\r\n"
BLANK_LINES = re.compile(rb"\n(?:[ \t\r\f\v]*\n)+")


class Document(NamedTuple):
    """A document, or one piece of a long one."""

    text: str
    file: str
    line: int
    starts: bool = True
    ends: bool = True

    @property
    def source(self) -> str:
        return f"{self.file}:{self.line}"


class Pieces(NamedTuple):
    """Documents and pieces of long ones, in order, as columns: a million small documents are no million objects."""

    texts: list[str]
    lines: list[int]
    starts: list[bool]
    ends: list[bool]


class Block(NamedTuple):
    """Consecutive bytes of a file: whole documents, but perhaps for the first and the last."""

    file: str
    raw: bytes
    rows: tuple[list[int], list[str]]  # lines and texts of what is parsed where it is read: .json, .csv, .parquet
    line: int  # of the first byte
    offset: int  # of the first byte, in the text as unpacked
    starts: bool  # whether its first document starts in it
    ends: bool  # whether its last document ends in it
    n_read: int  # bytes of the file, packed if it is, read since the block before


def text_format(path: str | Path) -> str | None:
    """One of KINDS by the name of a file, `.gz` left aside; None for any other."""
    suffixes = [suffix.lower()[1:] for suffix in Path(path).suffixes]
    packed = suffixes[-1:] == ["gz"]
    kind = suffixes[-2:-1] if packed else suffixes[-1:]
    return kind[0] if kind and kind[0] in KINDS and (packed, kind) != (True, ["parquet"]) else None


def documents(files: Iterable[str | Path], config: TextConfig) -> Iterator[Document]:
    """The documents of the files, in order; those without text left out, long ones in pieces.

    Raises ValueError naming file and line for what cannot be read.
    """
    for file in files:
        for block in blocks(file, config):
            texts, *columns = parse(block, config)
            for text, line, starts, ends in zip(texts, *columns):
                if text:
                    yield Document(text, block.file, line, starts, ends)


# --- from a path to files ---------------------------------------------------------------------------------------------


def find_files(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """The text files that paths, folders and globs name: in the order given, each once, those of a folder sorted.

    A folder is searched to the bottom for the formats we read; hidden files, those of OTHER and those that describe
    prepared tokens or cleaned text are left out.
    """
    found: dict[Path, None] = {}
    for one in [path] if isinstance(path, (str, Path)) else path:
        found |= dict.fromkeys(files_of(str(one)))
    return list(found)


def named_files(field: str, path: str | Sequence[str], hint: str = "") -> list[Path]:
    """`find_files` of what a field of the configuration names, which is named where nothing is found."""
    try:
        return find_files(path)
    except ValueError as error:
        raise ValueError(f"{field}: {error}{hint}") from None


def files_of(path: str) -> list[Path]:
    place = Path(path).expanduser()
    if place.is_dir():
        inside = sorted(p for p in place.rglob("*") if not any(part[0] == "." for part in p.relative_to(place).parts))
    elif place.is_file():
        if text_format(place) is None:
            raise ValueError(f"{path}: cannot tell the format from the name; it must end in {FORMATS}")
        return [place]
    elif glob.has_magic(path):
        inside = sorted(map(Path, glob.glob(str(place), recursive=True)))
    else:
        siblings = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
        close = difflib.get_close_matches(place.name, siblings, n=1)
        hint = f"; did you mean {place.parent / close[0]}?" if close else ""
        raise ValueError(f"{path}: no such file or folder{hint}")
    files = [p for p in inside if p.is_file() and text_format(p) is not None and p.name not in OTHER]
    files = [p for p in files if not describes_data(p)]
    if not files:
        raise ValueError(f"{path}: no text there; files must end in {FORMATS}")
    return files


def describes_data(path: Path) -> bool:
    """Whether a file is no text but stands beside what we made of text.

    The index of prepared tokens, that of a packing plan in a folder inside theirs, the report of cleaned text, and the
    rows that were dropped from it.
    """
    if path.name in ("report.json", "dropped.jsonl"):
        return is_cleaned(path.parent)
    homes = {"index.json": path.parent, "plan.json": path.parent.parent}
    return path.name in homes and is_prepared(homes[path.name])


# --- from a file to blocks --------------------------------------------------------------------------------------------


def blocks(path: str | Path, config: TextConfig) -> Iterator[Block]:
    """A file in blocks of about BLOCK bytes."""
    kind = text_format(path)
    assert kind is not None, path
    with opened(path) as (file, packed):
        if kind in ("txt", "jsonl"):
            yield from raw_blocks(str(path), file, packed, "row" if kind == "jsonl" else config.document)
        else:
            yield from row_blocks(str(path), packed, parsed_rows(kind, str(path), file, config.text_field))


@contextmanager
def opened(path: str | Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(the file unpacked, the file as it lies there). Raises ValueError where it cannot be read."""
    try:
        with open(path, "rb") as packed:
            yield (gzip.GzipFile(fileobj=packed), packed) if str(path).lower().endswith(".gz") else (packed, packed)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: the gzip data is damaged or cut short: {error}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def raw_blocks(name: str, file: BinaryIO, packed: BinaryIO, document: str) -> Iterator[Block]:
    """Blocks that end where a document ends, or, inside a document longer than a block, at a cut that is safe."""
    line, offset, starts, read = 1, 0, True, 0
    buffer = file.read(BLOCK)
    if buffer.startswith(b"\xef\xbb\xbf"):
        buffer, offset = buffer[3:], 3
    while buffer:
        stop = last_end(buffer, document)
        more = file.read(BLOCK if stop or document != "row" else len(buffer))
        if not more and (not stop or len(buffer) <= 2 * BLOCK):
            stop = len(buffer)
        ends = stop > 0
        if not ends and document == "row":
            if len(buffer) > MAX_ROW:
                raise ValueError(f"{name}:{line}: a row of more than {MAX_ROW:,} bytes; split it into several rows")
        else:
            stop = stop or cut_point(buffer)
            raw = buffer[:stop]
            yield Block(name, raw, ([], []), line, offset, starts, ends, packed.tell() - read)
            read = packed.tell()
            line, offset, starts = line + raw.count(b"\n"), offset + stop, ends
        buffer = buffer[stop:] + more


def last_end(buffer: bytes, document: str) -> int:
    """The position after the last document that is complete in the buffer; 0 when none is.

    Where the buffer has grown because of a long row it is that after this row.
    """
    if document == "file":
        return 0
    if document == "blank":
        return max((match.end() for match in BLANK_LINES.finditer(buffer)), default=0)
    return buffer.rfind(b"\n", 0, 2 * BLOCK) + 1 or buffer.find(b"\n") + 1  # parsing a row takes many times its memory


def cut_point(raw: bytes) -> int:
    """Where to cut UTF-8 in two parts, neither empty, so that the parts encode to the tokens of the whole.

    Best is before a single space between two words, where no tokenizer has a token across; next, before a line that
    starts with text; where neither is near, as in Chinese without a line break, between two other characters: the
    tokens there may differ from those of the whole, the text they decode to does not.
    """
    near = max(1, len(raw) - 4096)
    at = raw.rfind(b" ", near, -1)
    while at > 0 and (raw[at - 1] in SPACES or raw[at + 1] in SPACES):
        at = raw.rfind(b" ", near, at)
    if at > 0:
        return at
    at = raw.rfind(b"\n", near, -1) + 1
    while at > 0 and raw[at] in SPACES:
        at = raw.rfind(b"\n", near, at - 1) + 1
    if at > 0:
        return at
    at = len(raw) - 1
    while at > max(1, len(raw) - 4) and raw[at] & 0xC0 == 0x80:  # the second to fourth byte of a character
        at -= 1
    while at > near and raw[at - 1] in SPACES:  # white space stays together, since a blank line may end a document
        at -= 1
    return max(1, at)


def row_blocks(name: str, packed: BinaryIO, rows: Rows) -> Iterator[Block]:
    """Rows that are parsed where they are read: what fills a block."""
    read = 0
    for lines, texts in rows:
        yield Block(name, b"", (lines, texts), lines[0], 0, True, True, packed.tell() - read)
        read = packed.tell()


def parsed_rows(kind: str, name: str, file: BinaryIO, field: str) -> Rows:
    """(lines, texts) of the rows of a file, as many at a time as fill a block."""
    if kind == "json":
        rows = json_list_rows(name, file, BLOCK, MAX_ROW)
    else:
        rows = {"csv": csv_rows, "parquet": parquet_rows}[kind](name, file, field, BLOCK)
    for lines, values in rows:
        yield lines, row_texts(values, lines, name, field)


# --- from a block to documents ----------------------------------------------------------------------------------------


def parse(block: Block, config: TextConfig) -> Pieces:
    """The documents of a block, long ones in pieces, blank ones left out."""
    lines, texts = texts_of(block, config)
    starts, ends = [True] * len(texts), [True] * len(texts)
    starts[:1], ends[-1:] = [block.starts] * bool(texts), [block.ends] * bool(texts)
    pieces = Pieces(texts, lines, starts, ends)
    if "" in texts:
        kept = [i for i, text in enumerate(texts) if text or not (starts[i] and ends[i])]
        pieces = Pieces(*([column[i] for i in kept] for column in pieces))
    if max(map(len, texts), default=0) > PIECE // 4:
        pieces = cut_long(pieces, text_format(block.file) == "txt")
    return pieces


def texts_of(block: Block, config: TextConfig) -> tuple[list[int], list[str]]:
    """(lines, texts) of the documents of a block, the first and the last perhaps in part; "" for a blank one."""
    kind = text_format(block.file)
    if kind == "txt":
        lines, texts = text_parts(decoded(block), block, config.document)
    elif kind == "jsonl":
        lines, values = jsonl_rows(decoded(block), block.file, block.line)
        texts = row_texts(values, lines, block.file, config.text_field)
    else:
        lines, texts = map(list, block.rows)
    whole = slice(0 if block.starts else 1, None if block.ends else -1)
    if any(map(str.isspace, texts[whole])):
        texts[whole] = ["" if text.isspace() else text for text in texts[whole]]
    return lines, texts


def cut_long(pieces: Pieces, has_lines: bool) -> Pieces:
    """The same text in pieces of at most PIECE bytes; where a text has lines, each piece knows its own."""
    cut = Pieces([], [], [], [])
    for text, line, starts, ends in zip(*pieces):
        raw, at = text.encode() if len(text) > PIECE // 4 else b"", 0
        while len(raw) - at > PIECE:
            stop = at + cut_point(raw[at : at + PIECE])
            text = raw[at:stop].decode()
            for column, value in zip(cut, (text, line, starts and at == 0, False)):
                column.append(value)
            line += text.count("\n") if has_lines else 0
            at = stop
        for column, value in zip(cut, (raw[at:].decode() if at else text, line, starts and at == 0, ends)):
            column.append(value)
    return cut


def text_parts(text: str, block: Block, document: str) -> tuple[list[int], list[str]]:
    """(lines, texts) of the documents of a block of plain text."""
    if document == "file":
        return [block.line], [text]
    if document == "line":
        texts = text.removesuffix("\n").split("\n")
        return list(range(block.line, block.line + len(texts))), texts
    return paragraphs(text, block)


def paragraphs(text: str, block: Block) -> tuple[list[int], list[str]]:
    """(lines, texts) of what blank lines separate; line breaks around a paragraph are not part of it."""
    lines, texts = [], []
    line, at = block.line, 0
    for match in re.finditer(r"\n(?:[ \t\r\f\v]*\n)+|\Z", text):
        part = text[at : match.start()]
        begun, goes_on = at == 0 and not block.starts, match.end() == len(text) and not block.ends
        if begun or goes_on or not (not part or part.isspace()):
            inner = part if begun else part.lstrip("\n")
            lines.append(line + len(part) - len(inner))
            texts.append(inner if goes_on else inner.rstrip("\n"))
        line += text.count("\n", at, match.end())
        at = match.end()
    return lines, texts


def decoded(block: Block) -> str:
    """The text of a block: strict UTF-8, CRLF as LF, no NUL. Raises ValueError with the line and the byte."""
    try:
        text = block.raw.decode()
    except UnicodeDecodeError as error:
        line, byte = block.line + block.raw.count(b"\n", 0, error.start), block.offset + error.start
        utf_16 = block.offset == 0 and block.raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        hint = "it looks like UTF-16" if utf_16 else f"{error.reason} 0x{block.raw[error.start]:02x}"
        raise ValueError(f"{block.file}:{line}: not UTF-8 at byte {byte} ({hint}); convert the file to UTF-8") from None
    if "\0" in text:
        at = block.raw.index(b"\0")
        line, byte = block.line + block.raw.count(b"\n", 0, at), block.offset + at
        raise ValueError(f"{block.file}:{line}: a NUL character at byte {byte}; this is no text, or not UTF-8")
    return text.replace("\r\n", "\n")
