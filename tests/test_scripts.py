import sys
import unicodedata
from itertools import pairwise

import pytest

from minillm.scripts import BLOCKS, NAMES, script_counts, script_shares

TEXTS = {
    "Latin": "The hen ran home; café, naïve, Straße, Łódź, Việt",
    "Greek": "Η κότα έτρεξε στο σπίτι",
    "Cyrillic": "Курица убежала домой, їжак",
    "Hebrew": "התרנגולת רצה הביתה",
    "Arabic": "ركضت الدجاجة إلى البيت؛ پنجره",
    "Devanagari": "मुर्गी घर भाग गई।",
    "Bengali": "মুরগি বাড়ি দৌড়ে গেল",
    "Oriya": "କୁକୁଡ଼ା ଘରକୁ ଦୌଡ଼ିଗଲା",
    "Tamil": "கோழி வீட்டிற்கு ஓடியது",
    "Thai": "ไก่วิ่งกลับบ้าน",
    "Hangul": "암탉이 집으로 달려갔다",
    "Hiragana": "にわとりがうちへかえった",
    "Katakana": "ニワトリ",
    "Han": "母鸡跑回家了，她很高兴。",
    "Georgian": "ქათამი სახლში გაიქცა",
    "Ethiopic": "ዶሮዋ ወደ ቤት ሮጠች",
}


@pytest.mark.parametrize("script", TEXTS)
def test_a_text_in_one_script_is_of_that_script_alone(script):
    assert script_shares(TEXTS[script]) == {script: 1.0}


def test_what_is_no_letter_counts_for_no_script():
    assert script_shares("12,5 + 3 × 4 ÷ 2 = ?! \n\t🙂\ufe0f ， 。 ،") == {}
    assert script_shares("") == {}
    assert script_shares("母 1234567890 ........ 鸡") == {"Han": 1.0}


def test_shares_are_of_the_letters_and_the_largest_comes_first():
    assert script_counts("the 母鸡 hen") == {"Latin": 6, "Han": 2}
    assert script_shares("the 母鸡 hen") == {"Latin": 0.75, "Han": 0.25}
    assert list(script_shares("母鸡母鸡 hen")) == ["Han", "Latin"]


def test_a_letter_of_a_script_outside_the_table_is_other():
    assert script_shares("ᚠᚢ ab") == {"Other": 0.5, "Latin": 0.5} == {"Latin": 0.5, "Other": 0.5}


def test_half_a_surrogate_pair_is_no_letter():
    assert script_shares("a\ud83d") == {"Latin": 1.0}


def test_the_table_agrees_with_the_names_of_the_letters():
    """Unicode names a letter after its script: "CYRILLIC SMALL LETTER A"."""
    words = {name.upper(): name for name in BLOCKS} | {"CJK": "Han", "IDEOGRAPHIC": "Han"}
    letters = [chr(point) for point in range(sys.maxunicode + 1) if unicodedata.category(chr(point))[0] == "L"]
    checked, other, wrong = 0, 0, []
    for letter in letters:
        named = {words[word] for word in unicodedata.name(letter, "").replace("-", " ").split()[:2] if word in words}
        if len(named) != 1:
            continue
        found = next(iter(script_counts(letter)))
        checked, other = checked + 1, other + (found == "Other")
        if found not in {*named, "Other"}:
            wrong.append((letter, unicodedata.name(letter), found))
    assert checked > 100_000
    assert other < 0.01 * checked, "rare historic blocks may be left out, no more"
    assert not wrong, wrong[:10]


def test_no_code_point_is_in_two_scripts():
    blocks = sorted(block for blocks in BLOCKS.values() for block in blocks)
    assert all(last < first for (_, last), (first, _) in pairwise(blocks))
    assert len(NAMES) == len(set(NAMES)) == len(BLOCKS) + 1
