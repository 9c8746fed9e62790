"""What a document measures, as a table: a rule's name in `CleanConfig`, and the function whose value it bounds.

A rule named min_… keeps documents whose value is at least its threshold, one named max_… those whose value is at most
that. A measure that says nothing about a text (the frequent English words of a Chinese one) is None, and passes.

Words are what white space separates. In scripts without spaces between words (Han, kana, Thai, ...) each character
counts as one, and punctuation of their own as none; two of them make a word of an n-gram; the length of words and the
list of frequent words are not looked at.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from minillm.data.clean.config import CleanConfig
from minillm.data.clean.words import ALONE_SCRIPTS
from minillm.scripts import BLOCKS, script_shares

ALONE = "".join(f"{chr(first)}-{chr(last)}" for script in ALONE_SCRIPTS for first, last in BLOCKS[script])
# What stands between words there: general, ideographic and full-width punctuation.
BETWEEN = "\u2010-\u2027\u2030-\u205e\u3000-\u3004\u3008-\u3020\u3030\u30fb"
BETWEEN += "\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
ANY_ALONE = re.compile(f"[{ALONE}]")
MIXED_WORDS = re.compile(f"[{ALONE}]|[^\\s{ALONE}{BETWEEN}]+")
LETTER = re.compile(r"[^\W\d_]")
ELLIPSIS = re.compile(r"\.{3,}|…|\. \. \.")
BULLET = re.compile(r"\s*(?:[•‣◦●○▪■□·∙⁃]|[-*–]\s)")
PARAGRAPHS = re.compile(r"\n\s*\n")
# UTF-8 read as Latin-1 or Windows-1252: a lead byte as a character, then one or two continuation bytes as characters.
# Accented letters, typographic punctuation, and at least two characters of other scripts; é…” is none of these.
CONTINUATION = "[\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"
BROKEN = re.compile(
    f"�|[\xc2\xc3]{CONTINUATION}|\xe2[\x80-\x84€‚ƒ„]{CONTINUATION}|(?:[\xe3-\xe9]{CONTINUATION}{{2}}){{2,}}"
)
TERMINAL = ".!?。！？…"
CLOSING = "\"'”’»」』）)"  # what may follow the full stop of a sentence
SENTENCE_END = re.compile(r"[.!?。！？](?:(?<=[。！？])(?![。！？])|(?=[\"'”’»)]*(?:\s|$)))")
ALONE_CHARACTERS = 2  # that count as a word of an n-gram: a Chinese word has 1.5 to 2
TOP_NGRAMS = range(2, 5)
REPEATED_NGRAMS = range(5, 11)


class Page:
    """A text, and what several rules ask of it, worked out once."""

    def __init__(self, text: str, config: CleanConfig, as_read: str | None = None):
        self.text, self.config = text, config
        self.as_read = text if as_read is None else as_read  # before it was edited

    @cached_property
    def spaced(self) -> bool:
        """Whether most of its words are separated by spaces."""
        return not self.any_alone or 2 * sum(ANY_ALONE.match(word) is not None for word in self.words) < len(self.words)

    @cached_property
    def any_alone(self) -> bool:
        """Whether it has a character that is a word by itself."""
        return not self.text.isascii() and ANY_ALONE.search(self.text) is not None

    @cached_property
    def words(self) -> list[str]:
        """Its words."""
        return words_of(self.text) if self.any_alone else self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """Its lines, blank ones left out."""
        return [line.strip() for line in self.text.split("\n") if line and not line.isspace()]

    @cached_property
    def paragraphs(self) -> list[str]:
        """What blank lines separate."""
        return [part.strip() for part in PARAGRAPHS.split(self.text) if part and not part.isspace()]

    @cached_property
    def scripts(self) -> dict[str, float]:
        """The share of each script among its letters."""
        return script_shares(self.text)

    @cached_property
    def ngrams(self) -> dict[int, float]:
        """The share of characters in the most frequent n words, n up to 4, and in repeated n words beyond."""
        return ngram_shares(self.words, 1 if self.spaced else ALONE_CHARACTERS)


def words_of(text: str) -> list[str]:
    """The words of any text: runs without white space, and each character of scripts without spaces."""
    return MIXED_WORDS.findall(text) if ANY_ALONE.search(text) else text.split()


# --- measures of a page -----------------------------------------------------------------------------------------------


def broken(page: Page) -> float:
    """The share of characters that are no text: U+FFFD, or UTF-8 read as if it were Latin-1."""
    if page.as_read.isascii():
        return 0.0
    return sum(map(len, BROKEN.findall(page.as_read))) / len(page.as_read)


def script_share(page: Page) -> float | None:
    """The share of its letters that are in the scripts asked for."""
    wanted = page.config.scripts
    return sum(page.scripts.get(script, 0.0) for script in wanted) if wanted else None


def word_length(page: Page) -> float | None:
    """The mean number of characters of a word."""
    return sum(map(len, page.words)) / max(1, len(page.words)) if page.spaced else None


def hashes(page: Page) -> float:
    """Hash signs a word."""
    return page.text.count("#") / max(1, len(page.words))


def ellipses(page: Page) -> float:
    """Ellipses a word."""
    number = len(ELLIPSIS.findall(page.text)) if "..." in page.text or "…" in page.text or ". . ." in page.text else 0
    return number / max(1, len(page.words))


def bullet_lines(page: Page) -> float:
    """The share of lines that begin with a bullet."""
    return sum(BULLET.match(line) is not None for line in page.lines) / max(1, len(page.lines))


def ellipsis_lines(page: Page) -> float:
    """The share of lines that end with an ellipsis."""
    return sum(line.endswith(("...", "…", ". . .")) for line in page.lines) / max(1, len(page.lines))


def alphabetic_words(page: Page) -> float:
    """The share of words with at least one letter."""
    mixed = [word for word in page.words if not word.isalpha()]  # the search below is slow, and few words need it
    without = sum(LETTER.search(word) is None for word in mixed)
    return 1 - without / max(1, len(page.words))


def stop_words(page: Page) -> int | None:
    """How many of the frequent words it has, each counted once; None where most letters are not Latin."""
    if page.scripts.get("Latin", 0.0) <= 0.5:
        return None
    return len(set(page.config.stop_words) & set(map(str.lower, set(page.words))))


def repeated(parts: Sequence[str]) -> float:
    """The share of parts that stood before."""
    return 1 - len(set(parts)) / len(parts) if parts else 0.0


def repeated_chars(parts: Sequence[str]) -> float:
    """The share of characters in parts that stood before."""
    return 1 - sum(map(len, set(parts))) / sum(map(len, parts)) if parts else 0.0


def sentences(page: Page) -> int:
    """How many sentences it has, by their ends."""
    return len(SENTENCE_END.findall(page.text))


def ngram_shares(words: Sequence[str], size: int = 1) -> dict[int, float]:
    """For n of TOP_NGRAMS and REPEATED_NGRAMS the share of characters, white space not counted, that are repetition.

    An n-gram is n * size of the words. For n up to 4: those in all occurrences of the most frequent n-gram, of equally
    frequent ones the longest, if it occurs more than once. From 5: those in n-grams that stood before, each character
    once. An n-gram is repeated only where its first words are, so each length looks at the places that the one before
    has left.
    """
    shares = dict.fromkeys((*TOP_NGRAMS, *REPEATED_NGRAMS), 0.0)
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
    ids = np.fromiter(map(numbers.__getitem__, words), np.int64, len(words))
    ends = np.cumsum(np.fromiter(map(len, words), np.int64, len(words)))
    starts = np.concatenate([[0], ends[:-1]])
    places = np.flatnonzero(np.bincount(ids)[ids] > 1)  # where an n-gram that occurs more than once begins
    grams = ids[places]  # which it is, there
    for length in range(2, (REPEATED_NGRAMS.stop - 1) * size + 1):
        places, grams = places[places + length <= len(words)], grams[places + length <= len(words)]
        grams = grams * len(numbers) + ids[places + length - 1]
        _, first, grams, counts = np.unique(grams, return_index=True, return_inverse=True, return_counts=True)
        repeating = counts[grams] > 1
        if not repeating.any():
            break
        n, rest = divmod(length, size)
        if rest == 0 and n in TOP_NGRAMS:
            sizes = ends[places[first] + length - 1] - starts[places[first]]
            shares[n] = min(1.0, float((sizes * counts)[counts == counts.max()].max() / ends[-1]))
        elif rest == 0 and n in REPEATED_NGRAMS:
            again = np.ones(len(places), bool)
            again[first] = False
            covered = np.zeros(len(words) + 1, np.int64)
            covered[places[again]] += 1
            covered[places[again] + length] -= 1
            shares[n] = float((ends - starts)[np.cumsum(covered)[:-1] > 0].sum() / ends[-1])
        places, grams = places[repeating], grams[repeating]
    return shares


# The order is that in which rules are tried: a dropped document is counted under the first that it fails.
MEASURES: dict[str, Callable[[Page], float | None]] = {
    "max_broken": broken,
    "min_script_share": script_share,
    "max_lorem_ipsum": lambda page: page.text.lower().count("lorem ipsum"),
    "max_curly_brackets": lambda page: page.text.count("{") + page.text.count("}"),
    "min_sentences": sentences,
    "min_words": lambda page: len(page.words),
    "max_words": lambda page: len(page.words),
    "min_word_length": word_length,
    "max_word_length": word_length,
    "max_hashes": hashes,
    "max_ellipses": ellipses,
    "max_bullet_lines": bullet_lines,
    "max_ellipsis_lines": ellipsis_lines,
    "min_alphabetic_words": alphabetic_words,
    "min_stop_words": stop_words,
    "max_repeated_lines": lambda page: repeated(page.lines),
    "max_repeated_paragraphs": lambda page: repeated(page.paragraphs),
    "max_repeated_line_chars": lambda page: repeated_chars(page.lines),
    "max_repeated_paragraph_chars": lambda page: repeated_chars(page.paragraphs),
    **{f"max_top_{n}_gram": lambda page, n=n: page.ngrams[n] for n in TOP_NGRAMS},
    **{f"max_repeated_{n}_gram": lambda page, n=n: page.ngrams[n] for n in REPEATED_NGRAMS},
}


def thresholds(config: CleanConfig) -> dict[str, float]:
    """The rules about documents that are in use, in the order in which they are tried, with their thresholds."""
    chosen = config.chosen()
    limits = {name: getattr(config, name) for name in MEASURES if name in chosen}
    return {name: limit for name, limit in limits.items() if limit is not None}


def first_failed(page: Page, limits: dict[str, float]) -> tuple[str, float] | None:
    """(rule, value) of the first rule that a page fails; None for one to keep."""
    for name, limit in limits.items():
        value = MEASURES[name](page)
        if value is not None and (value < limit if name.startswith("min_") else value > limit):
            return name, value
    return None


# --- lines ------------------------------------------------------------------------------------------------------------


def ends_sentence(line: str) -> bool:
    """Whether a line ends as a sentence does, an ellipsis left aside."""
    end = line.rstrip()
    if end.endswith(("...", "…")):
        return False
    return end.endswith(('"', "”", "’", "'", "」", "』")) or end.rstrip(CLOSING)[-1:] in tuple(TERMINAL)


LINE_RULES: dict[str, Callable[[str, CleanConfig], bool]] = {
    "line_max_word_length": lambda line, config: max(map(len, line.split()), default=0) > config.line_max_word_length,
    "line_end": lambda line, config: config.line_end and not ends_sentence(line),
    "line_min_words": lambda line, config: len(words_of(line)) < config.line_min_words,
    "line_phrases": lambda line, config: any(phrase in line.lower() for phrase in config.line_phrases),
}


def line_rules(config: CleanConfig) -> list[str]:
    """The rules about lines that are in use, in the order in which they are tried."""
    chosen = config.chosen()
    return [name for name in LINE_RULES if name in chosen and getattr(config, name) not in (None, False, [])]


def without_lines(text: str, rules: Sequence[str], config: CleanConfig) -> tuple[str, Counter[str]]:
    """(the text without the lines that fail a rule, how many failed which). Blank lines are left as they are."""
    kept, removed = [], Counter[str]()
    for line in text.split("\n"):
        blank = not line or line.isspace()
        failed = None if blank else next((name for name in rules if LINE_RULES[name](line, config)), None)
        if failed is None:
            kept.append(line)
        else:
            removed[failed] += 1
    return "\n".join(kept) if removed else text, removed
