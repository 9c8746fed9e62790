"""Normalisation gives one spelling, twice the same, and leaves alone what means something."""

import pytest

from minillm.data.clean.normalise import normalise


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cafe\u0301", "café"),
        ("one\r\ntwo\rthree\u2028four", "one\ntwo\nthree\nfour"),
        (
            "bell\x07, soft\xadhyphen, zero\u200bwidth, \ufeffmark, \u202eturned",
            "bell, softhyphen, zerowidth, mark, turned",
        ),
        ("a  b\xa0c \u2003 d\te", "a b c d\te"),
        ("    if x:\n\treturn", "    if x:\n\treturn"),
        ("one   \n\n \n\n\ntwo\n\n", "one\n\ntwo"),
        ("\u3000\u3000段落", "\u3000\u3000段落"),
        ("می\u200cخواهم 👩\u200d👧", "می\u200cخواهم 👩\u200d👧"),
        ("ﬁ ①", "ﬁ ①"),
        ("", ""),
    ],
)
def test_texts_in_one_spelling(text, expected):
    assert normalise(text) == expected
    assert normalise(expected) == expected


def test_what_is_not_asked_for_is_not_done():
    assert normalise("cafe\u0301  x", "none", spaces=False) == "cafe\u0301  x"
    assert normalise("ﬁ ① ２", "nfkc") == "fi 1 2"
