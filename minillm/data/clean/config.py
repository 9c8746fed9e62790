"""The `clean` section: what is edited, what is dropped, and at which thresholds.

A threshold stands here once, with the value of its source; `none` switches its rule off. Sources: Gopher is Rae et al.
2021 (arXiv:2112.11446), sections A.1.1 and table A1; C4 is Raffel et al. 2020 (JMLR 21:140), section 2.2.
"""

import dataclasses
import difflib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from minillm.scripts import NAMES

Share = float | None
Count = int | None
FAMILIES = {
    "basic": ("max_broken", "min_script_share"),
    "gopher": (
        "min_words",
        "max_words",
        "min_word_length",
        "max_word_length",
        "max_hashes",
        "max_ellipses",
        "max_bullet_lines",
        "max_ellipsis_lines",
        "min_alphabetic_words",
        "min_stop_words",
    ),
    "repetition": (
        "max_repeated_lines",
        "max_repeated_paragraphs",
        "max_repeated_line_chars",
        "max_repeated_paragraph_chars",
        "max_top_2_gram",
        "max_top_3_gram",
        "max_top_4_gram",
        "max_repeated_5_gram",
        "max_repeated_6_gram",
        "max_repeated_7_gram",
        "max_repeated_8_gram",
        "max_repeated_9_gram",
        "max_repeated_10_gram",
    ),
    "c4": (
        "max_lorem_ipsum",
        "max_curly_brackets",
        "line_end",
        "line_min_words",
        "line_max_word_length",
        "line_phrases",
        "min_sentences",
    ),
}
ALL_RULES = set().union(*FAMILIES.values())
RULE_NAMES = {*FAMILIES, *ALL_RULES}
STOP_WORDS = ["the", "be", "to", "of", "and", "that", "have", "with"]
# Phrases of notices rather than of text: javascript from the paper, the policies from its published code.
NOTICES = [
    "javascript",
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
]
KINDS = ("email", "phone", "identity", "card", "iban", "key", "ip")
PLACEHOLDER = "<{kind}>"


@dataclass(frozen=True)
class CleanConfig:
    """What is edited and what is dropped."""

    rules: Annotated[list[str], "families of rules (basic, gopher, repetition, c4) or single rules, by name"] = field(
        default_factory=lambda: ["basic", "gopher", "repetition"]
    )
    unicode: Annotated[Literal["nfc", "nfkc", "none"], "Unicode normal form of the text"] = "nfc"
    spaces: Annotated[bool, "runs of spaces inside a line as one, at most one blank line, no spaces at its end"] = True
    max_bytes: Annotated[int, "longer documents are dropped, and never held whole", ">= 1, < 4294967296"] = 2**24
    # basic
    max_broken: Annotated[Share, "share of characters U+FFFD or UTF-8 read as Latin-1, at most", ">= 0"] = 0.001
    scripts: Annotated[list[str], "scripts that min_script_share asks for, such as Latin,Han; []: any"] = field(
        default_factory=list
    )
    min_script_share: Annotated[Share, "share of the letters in one of clean.scripts, at least", ">= 0, <= 1"] = 0.5
    # gopher
    min_words: Annotated[Count, "words, at least (Gopher)", ">= 0"] = 50
    max_words: Annotated[Count, "words, at most (Gopher)", ">= 0"] = 100_000
    min_word_length: Annotated[Share, "mean characters of a word, at least (Gopher)", ">= 0"] = 3.0
    max_word_length: Annotated[Share, "mean characters of a word, at most (Gopher)", ">= 0"] = 10.0
    max_hashes: Annotated[Share, "hash signs a word, at most (Gopher)", ">= 0"] = 0.1
    max_ellipses: Annotated[Share, "ellipses a word, at most (Gopher)", ">= 0"] = 0.1
    max_bullet_lines: Annotated[Share, "share of lines that begin with a bullet, at most (Gopher)", ">= 0"] = 0.9
    max_ellipsis_lines: Annotated[Share, "share of lines that end with an ellipsis, at most (Gopher)", ">= 0"] = 0.3
    min_alphabetic_words: Annotated[Share, "share of words with a letter, at least (Gopher)", ">= 0, <= 1"] = 0.8
    min_stop_words: Annotated[Count, "different words of clean.stop_words, at least (Gopher)", ">= 0"] = 2
    stop_words: Annotated[list[str], "frequent words that a text in Latin script must have; lower case"] = field(
        default_factory=lambda: list(STOP_WORDS)
    )
    # repetition (Gopher, table A1)
    max_repeated_lines: Annotated[Share, "share of lines that stood before, at most (Gopher)", ">= 0"] = 0.3
    max_repeated_paragraphs: Annotated[Share, "the same of paragraphs (Gopher)", ">= 0"] = 0.3
    max_repeated_line_chars: Annotated[Share, "share of characters in such lines, at most (Gopher)", ">= 0"] = 0.2
    max_repeated_paragraph_chars: Annotated[Share, "the same of paragraphs (Gopher)", ">= 0"] = 0.2
    max_top_2_gram: Annotated[Share, "share of characters in the most frequent 2 words, at most (Gopher)", ">= 0"] = 0.2
    max_top_3_gram: Annotated[Share, "the same of 3 words (Gopher)", ">= 0"] = 0.18
    max_top_4_gram: Annotated[Share, "the same of 4 words (Gopher)", ">= 0"] = 0.16
    max_repeated_5_gram: Annotated[Share, "share of characters in 5 words that stood before (Gopher)", ">= 0"] = 0.15
    max_repeated_6_gram: Annotated[Share, "the same of 6 words (Gopher)", ">= 0"] = 0.14
    max_repeated_7_gram: Annotated[Share, "the same of 7 words (Gopher)", ">= 0"] = 0.13
    max_repeated_8_gram: Annotated[Share, "the same of 8 words (Gopher)", ">= 0"] = 0.12
    max_repeated_9_gram: Annotated[Share, "the same of 9 words (Gopher)", ">= 0"] = 0.11
    max_repeated_10_gram: Annotated[Share, "the same of 10 words (Gopher)", ">= 0"] = 0.1
    # c4
    max_lorem_ipsum: Annotated[Count, "times that 'lorem ipsum' may occur (C4)", ">= 0"] = 0
    max_curly_brackets: Annotated[Count, "curly brackets there may be (C4)", ">= 0"] = 0
    line_end: Annotated[bool, "remove lines that do not end in a full stop, !, ?, or a quotation mark (C4)"] = True
    line_min_words: Annotated[Count, "remove lines of fewer words (C4)", ">= 0"] = 3
    line_max_word_length: Annotated[Count, "remove lines with a longer word (C4's published code)", ">= 1"] = 1000
    line_phrases: Annotated[list[str], "remove lines with one of these; lower case (C4)"] = field(
        default_factory=lambda: list(NOTICES)
    )
    min_sentences: Annotated[Count, "sentences, at least (C4)", ">= 0"] = 5
    # privacy
    privacy: Annotated[list[str], f"what is replaced: {', '.join(KINDS)}; []: nothing"] = field(
        default_factory=lambda: [kind for kind in KINDS if kind != "ip"]
    )
    placeholder: Annotated[str, "what stands in its place; {kind} is the kind in capitals"] = PLACEHOLDER
    # contamination and duplicates
    against: Annotated[str | list[str] | None, "test files: documents that hold a part of them are dropped"] = None
    against_field: Annotated[str | None, "field of a JSON row of the test files; none: as data.text_field"] = None
    against_share: Annotated[float, "share of a test's runs of 13 words to be found; 0: any", ">= 0, <= 1"] = 0.0
    exact: Annotated[bool, "drop documents with the text of one before, white space aside"] = True
    near: Annotated[
        float | None, "drop documents whose similarity (Jaccard, of 5 words) to one before is at least this", "> 0, < 1"
    ] = 0.8
    # output
    keep_dropped: Annotated[bool, "write dropped.jsonl: each dropped document with its rule and value"] = False
    compress: Annotated[bool, "write .jsonl.gz"] = False

    def __post_init__(self):
        problems = [
            *(f"rules: {name!r} is no rule{nearest(name, RULE_NAMES)}" for name in set(self.rules) - RULE_NAMES),
            *(f"privacy: {name!r} is no kind{nearest(name, KINDS)}" for name in set(self.privacy) - set(KINDS)),
            *(f"scripts: {name!r} is no script{nearest(name, NAMES)}" for name in set(self.scripts) - set(NAMES)),
            *self.idle(self.chosen()),
            *self.impossible(self.chosen()),
        ]
        if problems:
            raise ValueError("\n".join(sorted(problems)))

    def idle(self, chosen: set[str]) -> Iterator[str]:
        """What is wrong with settings that would have no effect."""
        for option in dataclasses.fields(self):
            if option.name in ALL_RULES - chosen and getattr(self, option.name) not in (default_of(option), None):
                family = next(family for family, rules in FAMILIES.items() if option.name in rules)
                advice = f"add {option.name} or its family, {family}, to clean.rules"
                yield f"{option.name}: its rule is not in use; {advice}"
        for words, rule, family in (
            ("scripts", "min_script_share", "basic"),
            ("stop_words", "min_stop_words", "gopher"),
        ):
            if rule not in chosen and getattr(self, words) not in ([], STOP_WORDS):
                yield f"{words}: their rule is not in use; add {rule} or its family, {family}, to clean.rules"
        for name in ("stop_words", "line_phrases"):
            capital = next((word for word in getattr(self, name) if word != word.lower()), None)
            if capital is not None:
                yield f"{name}: {capital!r} is not in lower case, so it would never be found"
        for name in ("against_field", "against_share"):
            if self.against is None and getattr(self, name):
                yield f"{name}: is for test files; name them in clean.against"
        if not self.privacy and self.placeholder != PLACEHOLDER:
            yield "placeholder: nothing is replaced where clean.privacy is []"

    def impossible(self, chosen: set[str]) -> Iterator[str]:
        """What is wrong with thresholds that no text meets."""
        words = len(set(self.stop_words))
        if "min_stop_words" in chosen and (self.min_stop_words or 0) > words:
            yield f"min_stop_words: is {self.min_stop_words}, and clean.stop_words has {words}; no text would be kept"
        for low, high in (("min_words", "max_words"), ("min_word_length", "max_word_length")):
            least, most = getattr(self, low), getattr(self, high)
            if {low, high} <= chosen and None not in (least, most) and least > most:
                yield f"{low}: is {least:g} and {high} {most:g}; no text would be kept"

    def chosen(self) -> set[str]:
        """The names of the rules that `rules` asks for."""
        return set().union(*(FAMILIES.get(name, (name,)) for name in self.rules))


def nearest(name: str, names: Collection[str]) -> str:
    """ "; did you mean …?" for the likeliest of the names, or all of them."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(names))}"


def default_of(option: dataclasses.Field) -> Any:
    """The default of a field."""
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()
