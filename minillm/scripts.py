"""In which scripts a text is written: Latin, Han, Cyrillic, ... by the Unicode block of its letters."""

import sys
import unicodedata
from functools import cache

import numpy as np

OTHER = "Other"  # letters of a script that is not in the table
# First and last code point of the blocks of each script (Unicode's Blocks.txt); what is no letter in them is left out.
BLOCKS = {
    "Latin": [(0x41, 0x2FF), (0x1E00, 0x1EFF), (0x2C60, 0x2C7F), (0xA720, 0xA7FF), (0xFB00, 0xFB06), (0xFF21, 0xFF5A)],
    "Greek": [(0x370, 0x3FF), (0x1F00, 0x1FFF)],
    "Cyrillic": [(0x400, 0x52F), (0x1C80, 0x1C8F), (0x2DE0, 0x2DFF), (0xA640, 0xA69F)],
    "Armenian": [(0x530, 0x58F), (0xFB13, 0xFB17)],
    "Hebrew": [(0x590, 0x5FF), (0xFB1D, 0xFB4F)],
    "Arabic": [(0x600, 0x6FF), (0x750, 0x77F), (0x870, 0x8FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFE)],
    "Devanagari": [(0x900, 0x97F), (0xA8E0, 0xA8FF)],
    "Bengali": [(0x980, 0x9FF)],
    "Gurmukhi": [(0xA00, 0xA7F)],
    "Gujarati": [(0xA80, 0xAFF)],
    "Oriya": [(0xB00, 0xB7F)],
    "Tamil": [(0xB80, 0xBFF)],
    "Telugu": [(0xC00, 0xC7F)],
    "Kannada": [(0xC80, 0xCFF)],
    "Malayalam": [(0xD00, 0xD7F)],
    "Sinhala": [(0xD80, 0xDFF)],
    "Thai": [(0xE00, 0xE7F)],
    "Lao": [(0xE80, 0xEFF)],
    "Tibetan": [(0xF00, 0xFFF)],
    "Myanmar": [(0x1000, 0x109F), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F)],
    "Georgian": [(0x10A0, 0x10FF), (0x1C90, 0x1CBF), (0x2D00, 0x2D2F)],
    "Hangul": [(0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF), (0xFFA0, 0xFFDC)],
    "Ethiopic": [(0x1200, 0x139F), (0x2D80, 0x2DDF), (0xAB00, 0xAB2F)],
    "Khmer": [(0x1780, 0x17FF)],
    "Mongolian": [(0x1800, 0x180A), (0x1810, 0x18AF)],
    "Hiragana": [(0x3041, 0x309F)],
    "Katakana": [(0x30A0, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F)],
    "Han": [(0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)],
}
NAMES = (*BLOCKS, OTHER)


@cache
def places() -> np.ndarray:
    """For each code point the place of its script in NAMES, from 1; 0 for what is no letter and no mark of one."""
    kinds = "".join(unicodedata.category(chr(point))[0] for point in range(sys.maxunicode + 1))
    kinds = np.frombuffer(kinds.encode("ascii"), dtype=np.uint8)
    letters = kinds == ord("L")
    table = np.where(letters, len(NAMES), 0).astype(np.uint8)  # a mark in no block, such as an accent, joins any script
    for place, blocks in enumerate(BLOCKS.values(), start=1):
        for first, last in blocks:
            block = slice(first, last + 1)
            table[block] = np.where(letters[block] | (kinds[block] == ord("M")), place, 0)
    return table


def script_counts(text: str) -> dict[str, int]:
    """How many letters of each script a text has, the most frequent first; {} for a text without letters."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    counts = np.bincount(places()[points], minlength=len(NAMES) + 1)[1:].tolist()
    found = sorted(((count, name) for count, name in zip(counts, NAMES) if count), key=lambda pair: -pair[0])
    return {name: count for count, name in found}


def script_shares(text: str) -> dict[str, float]:
    """The share of each script among the letters of a text, the largest first; {} for a text without letters."""
    counts = script_counts(text)
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()}
