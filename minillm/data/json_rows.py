"""Rows of JSON and the text in them: the lines of a .jsonl, the elements of the list that a .json is.

A list is read element by element, so that memory is bounded by the largest row and not by the file.
"""

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

CHUNK = 2**20
FENCE = 0x6D696E696C6C6D  # a number that is in no row
NOT_A_LIST = "a list of rows is expected, [...]; if each line is a row of its own, name the file .jsonl"


class NotJSON(NamedTuple):
    """A line that is no JSON, in the place of its value."""

    why: str


def jsonl_rows(text: str, file: str, first_line: int, strict: bool = True) -> tuple[list[int], list[object]]:
    """(lines, values) of the rows of JSONL; lines without anything are no rows.

    Raises ValueError for a line that is no JSON; not `strict`: it is NotJSON.
    """
    rows = text.removesuffix("\n").split("\n")
    lines = list(range(first_line, first_line + len(rows)))
    if "" in rows or any(map(str.isspace, rows)):
        lines = [line for line, row in zip(lines, rows) if row and not row.isspace()]
        rows = [row for row in rows if row and not row.isspace()]
    if len(rows) == 1:  # perhaps a very long one, of which the list would be one copy more
        return lines, [json_value(rows[0], f"{file}:{lines[0]}", strict)]
    # One list is parsed twice as fast as its rows. The fences tell rows apart that would be whole only together.
    try:
        values = json.loads(f"[{f',{FENCE},'.join(rows)}]")
    except (ValueError, RecursionError):
        values = []
    if len(values) != max(0, 2 * len(rows) - 1) or values[1::2] != [FENCE] * len(values[1::2]):
        return lines, [json_value(row, f"{file}:{line}", strict) for line, row in zip(lines, rows)]
    return lines, values[::2]


def json_value(row: str, place: str, strict: bool) -> object:
    try:
        return json.loads(row)
    except json.JSONDecodeError as error:
        why = f"{error.msg} (column {error.colno})"
    except (RecursionError, ValueError) as error:  # nested, or with digits, beyond Python's limits
        why = str(error)
    if strict:
        raise ValueError(f"{place}: not valid JSON: {why}")
    return NotJSON(why)


def row_texts(values: list[object], lines: list[int], file: str, field: str) -> list[str]:
    """The text of each row. Raises ValueError naming the first row that has none."""
    texts = [value.get(field) if isinstance(value, dict) else value for value in values]
    try:
        together = "".join(texts)
        together.encode()
    except (TypeError, UnicodeEncodeError):
        together = "\0"
    if "\0" in together or "\r\n" in together:
        texts = [row_text(value, f"{file}:{line}", field) for value, line in zip(values, lines)]
    return texts


def row_text(value: object, place: str, field: str) -> str:
    """The text of a JSON row. Raises ValueError where there is none, or it holds what is no character."""
    text, what = value, f"the row is {named(value)}"
    if isinstance(value, dict):
        if field not in value:
            found = ", ".join(map(str, value)) or "no fields"
            missing = f'field "{field}" is missing (found: {found})'
            raise ValueError(f"{place}: {missing}; set data.text_field or fix the line")
        text = value[field]
        what = f'field "{field}" is {named(text)}'
    if not isinstance(text, str):
        raise ValueError(f"{place}: {what}; text is expected; set data.text_field or fix the line")
    if "\0" in text:
        raise ValueError(f"{place}: a NUL character in the text; remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"{place}: half a character, {surrogate}, in the text; fix the line") from None
    return text.replace("\r\n", "\n")


def named(value: object) -> str:
    """A JSON value in words: `a number`."""
    if value is None:
        return "null"
    if isinstance(value, NotJSON):
        return f"not valid JSON: {value.why}"
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def json_list_rows(
    name: str, file: BinaryIO, batch_size: int, max_row: int
) -> Iterator[tuple[list[int], list[object]]]:
    """(lines, values) of the elements, as many at a time as fill a batch of so many characters.

    Raises ValueError with the line where the file is no JSON list.
    """
    reader = JsonListReader(name, file, max_row)
    sign = reader.next_sign()
    if not sign:
        return
    if sign != "[":
        raise reader.refuse(reader.at, NOT_A_LIST)
    reader.at += 1
    if reader.next_sign() == "]":
        sign = "]"
    lines, values, size = [], [], 0
    while sign != "]":
        line, value, length = reader.value()
        lines.append(line)
        values.append(value)
        size += length
        if size >= batch_size:
            yield lines, values
            lines, values, size = [], [], 0
        sign = reader.next_sign()
        if sign not in ("]", ","):
            ended = "the file ends inside the list" if not sign else f"',' or ']' is expected, found {sign!r}"
            raise reader.refuse(reader.at, f"not valid JSON: {ended}")
        if sign == ",":
            reader.at += 1
            reader.next_sign()
    reader.at += 1
    if reader.next_sign():
        raise reader.refuse(reader.at, "not valid JSON: text after the end of the list")
    if lines:
        yield lines, values


class JsonListReader:
    """The text of the file from a position on, of which only as much is held as is being parsed."""

    def __init__(self, name: str, file: BinaryIO, max_row: int):
        self.name, self.file, self.max_row = name, file, max_row
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at = "", 0
        self.line, self.counted = 1, 0  # the line of text[counted]
        self.bytes_read, self.lines_read = 0, 0
        self.ended = False

    def refill(self) -> bool:
        """Drop what is behind, read more; at least as much again as is held. False at the end of the file."""
        if self.ended:
            return False
        self.line_at(self.at)
        self.text, self.at, self.counted = self.text[self.at :], 0, 0
        data = self.file.read(max(CHUNK, len(self.text)))
        self.ended = not data
        pending = len(self.decoder.getstate()[0])
        try:
            self.text += self.decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            read = self.lines_read + error.object.count(b"\n", pending, error.start)
            byte = self.bytes_read - pending + error.start
            raise ValueError(f"{self.name}:{read + 1}: not UTF-8 at byte {byte}; convert the file to UTF-8") from None
        self.bytes_read += len(data)
        self.lines_read += data.count(b"\n")
        return True

    def line_at(self, position: int) -> int:
        """The line of a position in the text; positions must not go back."""
        self.line += self.text.count("\n", self.counted, position)
        self.counted = position
        return self.line

    def refuse(self, position: int, what: str) -> ValueError:
        return ValueError(f"{self.name}:{self.line_at(position)}: {what}")

    def next_sign(self) -> str:
        """The next character that is not white space, not yet taken; "" at the end of the file."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\r\n":
                    return self.text[self.at]
                self.at += 1
            if not self.refill():
                return ""

    def value(self) -> tuple[int, object, int]:
        """(line, value, characters) of the JSON value here."""
        decoder = json.JSONDecoder()
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                # The value may only be incomplete. One that is broken fails again, at the same place.
                if len(self.text) - self.at <= self.max_row and self.refill():
                    continue
                at, message = getattr(error, "pos", self.at), getattr(error, "msg", str(error))
                if len(self.text) - self.at > self.max_row:
                    at, message = self.at, f"{message}, or the row has more than {self.max_row:,} characters"
                raise self.refuse(at, f"not valid JSON: {message}") from None
            line, length = self.line_at(self.at), end - self.at
            self.at = end
            return line, value, length
