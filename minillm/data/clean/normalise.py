"""One spelling of a text: Unicode in one form, no invisible characters, no runs of spaces and blank lines."""

import re
import unicodedata
from typing import Literal

Form = Literal["nfc", "nfkc", "none"]

# Characters that end a line: carriage return, vertical tab, form feed, next line, line and paragraph separator.
ENDS = "\r\v\f\x85\u2028\u2029"
LINE_ENDS = re.compile(f"\r\n|[{ENDS}]")
# Control characters but tab and line feed, the soft hyphen, zero-width space and word joiner, the byte order mark, and
# the marks that turn the direction of text. The joiners U+200C and U+200D stay: Persian, Indic scripts and emoji differ
# without them.
CONTROLS = "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f"
HIDDEN = f"{CONTROLS}\xad\u200b\u2060\ufeff\u200e\u200f\u202a-\u202e\u2066-\u2069"
INVISIBLE = re.compile(f"[{HIDDEN}]")
UNUSUAL = re.compile(f"[{ENDS}{HIDDEN}]")
RARE_SPACES = "\xa0\u1680\u2000-\u200a\u202f\u205f"
SPACES = f" \t{RARE_SPACES}"
ANY_RARE = re.compile(f"[{RARE_SPACES}]")
RUNS = re.compile(f"(?<=\\S)(?:[{RARE_SPACES}]|[{SPACES}]{{2,}})(?=\\S)")  # between two characters of a line
BLANK_LINES = re.compile("\n{3,}")


def normalise(text: str, form: Form = "nfc", spaces: bool = True) -> str:
    """The text in a Unicode normal form, without control and invisible characters; with `spaces`, runs of them as one.

    The indentation of a line is kept, since it means something in code and verse; at most one blank line stands
    between two others.
    """
    if form != "none" and not text.isascii():
        text = unicodedata.normalize(form.upper(), text)
    if UNUSUAL.search(text):
        text = INVISIBLE.sub("", LINE_ENDS.sub("\n", text))
    if spaces:
        if "  " in text or "\t" in text or ANY_RARE.search(text):
            text = RUNS.sub(" ", text)
        text = "\n".join(map(str.rstrip, text.split("\n"))).strip("\n")
        text = BLANK_LINES.sub("\n\n", text) if "\n\n\n" in text else text
    return text
