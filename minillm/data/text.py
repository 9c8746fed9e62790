"""Text files as a stream of documents, in bounded memory however long a file, a line or a document is.

A file is read in blocks of some MiB of raw bytes, cut where a document ends when one does. A block can then be parsed
on its own, by any process. A document larger than a piece comes in several, cut where the tokens are the same as
without the cut whenever there is such a place: before a single space between two words.

    file    ....................................   read in order, by one process
    blocks  |...........|...........|..........|   Block: raw bytes and where they stand
    pieces  |..|...|....|                          Document: text, where it stands, whether it starts or ends here

A row of JSON is the one thing that has to be held whole: at most MAX_ROW bytes of it.
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

from minillm.data.config import DataConfig
from minillm.data.json_rows import json_list_rows, jsonl_rows, row_texts

BLOCK = 2**20  # bytes read at a time: 0.2 s of tokenising, so that a process is not kept waiting for its next one
PIECE = 2**14  # bytes: sentencepiece encodes pieces of 16 KiB three times as fast as one text of 1 MiB
MAX_ROW = 2**28  # bytes of one JSON row, 256 MiB
FORMATS = ".txt, .jsonl or .json, or one of these and .gz"
SPACES = b" \t\r\n"
BLANK_LINES = re.compile(rb"\n(?:[ \t\r\f\v]*\n)+")


class Document(NamedTuple):
    """A document, or one piece of a long one. A document without text is kept, empty, so that it can be counted."""

    text: str
    file: str
    line: int
    starts: bool = True
    ends: bool = True

    @property
    def source(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def has_lines(self) -> bool:
        """Whether a line break in the text is one in the file, as it is not in a row of JSON."""
        return text_format(self.file) == "txt"


class Block(NamedTuple):
    """Consecutive bytes of a file: whole documents, but perhaps for the first and the last."""

    file: str
    raw: bytes
    rows: list[tuple[int, str]]  # (line, text) of the rows of a .json, which is parsed where it is read
    line: int  # of the first byte
    offset: int  # of the first byte, in the text as unpacked
    starts: bool  # whether its first document starts in it
    ends: bool  # whether its last document ends in it
    n_read: int  # bytes of the file, packed if it is, read since the block before


def text_format(path: str | Path) -> str | None:
    """txt, jsonl or json by the name of a file, `.gz` left aside; None for any other."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1][1:] if suffixes and suffixes[-1] in (".txt", ".jsonl", ".json") else None


def documents(files: Iterable[str | Path], config: DataConfig) -> Iterator[Document]:
    """The documents of the files, in order; those without text left out, long ones in pieces.

    Raises ValueError naming file and line for what cannot be read.
    """
    for file in files:
        for block in blocks(file, config):
            yield from (document for document in parse(block, config) if document.text)


# --- from a path to files ---------------------------------------------------------------------------------------------


def find_files(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """The text files that paths, folders and globs name: in the order given, each once, those of a folder sorted.

    A folder is searched to the bottom for the formats we read; hidden files and dataset_info.json are left out.
    """
    found: dict[Path, None] = {}
    for one in [path] if isinstance(path, (str, Path)) else path:
        found |= dict.fromkeys(files_of(str(one)))
    return list(found)


def files_of(path: str) -> list[Path]:
    place = Path(path).expanduser()
    if place.is_dir():
        inside = sorted(p for p in place.rglob("*") if not any(part[0] == "." for part in p.relative_to(place).parts))
    elif place.exists():
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
    files = [p for p in inside if p.is_file() and text_format(p) is not None and p.name != "dataset_info.json"]
    if not files:
        raise ValueError(f"{path}: no text there; files must end in {FORMATS}")
    return files


# --- from a file to blocks --------------------------------------------------------------------------------------------


def blocks(path: str | Path, config: DataConfig) -> Iterator[Block]:
    """A file in blocks of about BLOCK bytes."""
    kind = text_format(path)
    assert kind is not None, path
    with opened(path) as (file, packed):
        if kind == "json":
            yield from json_blocks(str(path), file, packed, config)
        else:
            yield from raw_blocks(str(path), file, packed, "row" if kind == "jsonl" else config.document)


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
        more = file.read(len(buffer) if document == "row" and len(buffer) > 2 * BLOCK else BLOCK)
        stop = last_end(buffer, document) if more else len(buffer)
        ends = stop > 0
        if not ends and document == "row":
            if len(buffer) > MAX_ROW:
                raise ValueError(f"{name}:{line}: a row of more than {MAX_ROW:,} bytes; split it into several rows")
        else:
            stop = stop or cut_point(buffer)
            raw = buffer[:stop]
            yield Block(name, raw, [], line, offset, starts, ends, packed.tell() - read)
            read = packed.tell()
            line, offset, starts = line + raw.count(b"\n"), offset + stop, ends
        buffer = buffer[stop:] + more


def last_end(buffer: bytes, document: str) -> int:
    """The position after the last document that is complete in the buffer; 0 when none is."""
    if document == "file":
        return 0
    if document == "blank":
        return max((match.end() for match in BLANK_LINES.finditer(buffer)), default=0)
    return buffer.rfind(b"\n") + 1


def cut_point(raw: bytes) -> int:
    """Where to cut UTF-8 in two parts, neither empty, so that the parts encode to the tokens of the whole.

    Best is before a single space between two words, where no tokenizer has a token across; next, before a line that
    starts with text; where neither is near, as in Chinese without a line break, between any two characters: the
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
    return at - 1 if at > 1 and raw[at - 1 : at + 1] == b"\r\n" else max(1, at)


def json_blocks(name: str, file: BinaryIO, packed: BinaryIO, config: DataConfig) -> Iterator[Block]:
    """The rows of a .json list, gathered until they fill a block."""
    rows: list[tuple[int, object]] = []
    size = read = 0
    for line, value, length in json_list_rows(name, file, MAX_ROW):
        rows.append((line, value))
        size += length
        if size >= BLOCK:
            yield Block(
                name, b"", row_texts(rows, name, config.text_field), rows[0][0], 0, True, True, packed.tell() - read
            )
            rows, size, read = [], 0, packed.tell()
    if rows:
        yield Block(
            name, b"", row_texts(rows, name, config.text_field), rows[0][0], 0, True, True, packed.tell() - read
        )


# --- from a block to documents ----------------------------------------------------------------------------------------


def parse(block: Block, config: DataConfig) -> Iterator[Document]:
    """The documents of a block, long ones in pieces, blank ones with empty text."""
    found = texts(block, config)
    for i, (line, text) in enumerate(found):
        starts, ends = i > 0 or block.starts, i + 1 < len(found) or block.ends
        if len(text) > PIECE // 4:
            yield from pieces(Document(text, block.file, line, starts, ends))
        else:
            yield Document(text, block.file, line, starts, ends)


def texts(block: Block, config: DataConfig) -> list[tuple[int, str]]:
    """(line, text) of each document of a block, the first and the last perhaps in part; "" for a blank one."""
    kind = text_format(block.file)
    if kind == "json":
        found = block.rows
    elif kind == "jsonl":
        found = row_texts(jsonl_rows(decoded(block), block.file, block.line), block.file, config.text_field)
    else:
        found = text_parts(decoded(block), block, config.document)
    whole = slice(0 if block.starts else 1, None if block.ends else -1)
    if any(not text or text.isspace() for _, text in found[whole]):
        found[whole] = [(line, "" if text.isspace() else text) for line, text in found[whole]]
    return found


def pieces(document: Document) -> Iterator[Document]:
    """A long document in pieces of at most PIECE bytes."""
    text, file, line, starts, ends = document
    raw, at = text.encode(), 0
    while len(raw) - at > PIECE:
        stop = at + cut_point(raw[at : at + PIECE])
        part = raw[at:stop].decode()
        yield Document(part, file, line, starts and at == 0, False)
        line += part.count("\n") if document.has_lines else 0
        at = stop
    yield Document(raw[at:].decode(), file, line, starts and at == 0, ends)


def text_parts(text: str, block: Block, document: str) -> list[tuple[int, str]]:
    """(line, text) of each document of a block of plain text."""
    if document == "file":
        return [(block.line, text)]
    if document == "line":
        return list(enumerate(text.removesuffix("\n").split("\n"), block.line))
    return list(paragraphs(text, block))


def paragraphs(text: str, block: Block) -> Iterator[tuple[int, str]]:
    """(line, text) of what blank lines separate; line breaks around a paragraph are not part of it."""
    line, at = block.line, 0
    for match in re.finditer(r"\n(?:[ \t\r\f\v]*\n)+|\Z", text):
        part = text[at : match.start()]
        begun, goes_on = at == 0 and not block.starts, match.end() == len(text) and not block.ends
        if begun or goes_on or not (not part or part.isspace()):
            inner = part if begun else part.lstrip("\n")
            yield line + len(part) - len(inner), inner if goes_on else inner.rstrip("\n")
        line += text.count("\n", at, match.end())
        at = match.end()


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
