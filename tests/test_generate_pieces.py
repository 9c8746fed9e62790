"""Text comes as soon as it is certain, and what leads to a stop string never does."""

import random

import pytest

from minillm.generate.params import SamplingParams
from minillm.generate.pieces import TextPieces
from minillm.tokenizer import SPECIAL_TOKENS, ByteTokenizer

TOKENIZER = ByteTokenizer()
TEXT = "né 中文 🎉 end"


class ChunkTokenizer:
    """Tokens of any bytes: cuts a text wherever it is told to, also inside characters."""

    def __init__(self, chunks: list[bytes]):
        self.chunks = chunks
        self.special_tokens = {}

    def token_bytes(self, id: int) -> bytes:
        return self.chunks[id]


def pieces_of(tokenizer, tokens, **fields) -> tuple[list[str], TextPieces]:
    """The piece of each token, and of the end; no token follows a stop string."""
    text = TextPieces(tokenizer, SamplingParams(**fields))
    pieces = []
    for token in tokens:
        pieces.append(text.add(token))
        if text.stopped:
            break
    return [*pieces, text.end()], text


def before_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The plain definition: read a character at a time until the text ends with a stop string."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def cut_at_random(text: str, rng: random.Random) -> list[bytes]:
    data = text.encode()
    edges = sorted(rng.sample(range(1, len(data)), rng.randint(0, len(data) - 1))) if len(data) > 1 else []
    return [data[a:b] for a, b in zip([0, *edges], [*edges, len(data)])]


def test_no_character_is_split():
    pieces, _ = pieces_of(TOKENIZER, TOKENIZER.encode(TEXT))
    assert [piece for piece in pieces if piece] == list(TEXT)


def test_a_part_of_a_character_at_the_end_is_a_replacement_mark():
    pieces, _ = pieces_of(TOKENIZER, TOKENIZER.encode("né 中")[:-1])
    assert "".join(pieces) == "né \ufffd"
    assert pieces[-1] == "\ufffd"


@pytest.mark.parametrize("letters", ["ab", "aé中"])
def test_pieces_are_the_text_before_the_first_stop_string_however_tokens_cut_it(letters):
    rng = random.Random(0)
    stopped_texts = 0
    for _ in range(1500):
        text = "".join(rng.choices(letters, k=rng.randint(1, 12)))
        stops = ["".join(rng.choices(letters, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        expected, stopped = before_stop(text, stops)
        tokenizer = ChunkTokenizer(cut_at_random(text, rng))
        pieces, state = pieces_of(tokenizer, range(len(tokenizer.chunks)), stop=stops)
        assert "".join(pieces) == expected, (text, stops, tokenizer.chunks)
        assert state.stopped == stopped
        stopped_texts += stopped
        for shown in ("".join(pieces[:i]) for i in range(len(pieces))):  # at no time more than belongs to the text
            assert expected.startswith(shown)
    assert 300 < stopped_texts < 1450


def test_only_what_may_become_a_stop_string_is_held_back():
    pieces, _ = pieces_of(TOKENIZER, TOKENIZER.encode("one, two. STOP"), stop=["STOP", ", t!"])
    assert pieces[:10] == ["o", "n", "e", "", "", "", ", tw", "o", ".", " "]
    assert pieces[10:] == ["", "", "", "", ""]


def test_the_stop_string_that_ends_first_wins_and_the_longest_of_those():
    for stops, expected in [(["abcd", "bc"], "x a"), (["bc", "abc"], "x "), (["c", "d"], "x ab")]:
        for chunks in ([b"x abcde"], [b"x ", b"a", b"b", b"c", b"d", b"e"], [b"x a", b"bcd", b"e"]):
            pieces, _ = pieces_of(ChunkTokenizer(chunks), range(len(chunks)), stop=stops)
            assert "".join(pieces) == expected


def test_nothing_comes_after_a_stop_string():
    text = TextPieces(TOKENIZER, SamplingParams(stop="b"))
    assert [text.add(token) for token in TOKENIZER.encode("abc")] == ["a", "", ""]
    assert (text.end(), text.stopped) == ("", True)


def test_stop_strings_before_the_minimum_are_text():
    pieces, state = pieces_of(TOKENIZER, TOKENIZER.encode("a.b.c."), stop=".", min_new_tokens=3)
    assert "".join(pieces) == "a.b"
    assert state.tokens == 4


def test_special_tokens_are_shown_where_they_are_not_skipped():
    special = TOKENIZER.special_tokens["<|im_end|>"]
    tokens = [*TOKENIZER.encode("né"), special, *TOKENIZER.encode("x")]
    assert "".join(pieces_of(TOKENIZER, tokens)[0]) == TOKENIZER.decode(tokens) == "néx"
    shown = "".join(pieces_of(TOKENIZER, tokens, skip_special_tokens=False)[0])
    assert shown == TOKENIZER.decode(tokens, skip_special=False) == "né<|im_end|>x"
    stopped = pieces_of(TOKENIZER, tokens, skip_special_tokens=False, stop="<|im_end|>")[0]
    assert "".join(stopped) == "né"


def test_any_tokens_give_the_text_that_decoding_them_together_gives():
    rng = random.Random(1)
    for _ in range(300):
        tokens = rng.choices(range(TOKENIZER.vocab_size), k=12) + rng.choices(range(len(SPECIAL_TOKENS)), k=2)
        rng.shuffle(tokens)
        for skip in (True, False):
            pieces, _ = pieces_of(TOKENIZER, tokens, skip_special_tokens=skip)
            assert "".join(pieces) == TOKENIZER.decode(tokens, skip_special=skip)


def test_without_a_tokenizer_there_is_no_text():
    assert pieces_of(None, [1, 2])[0] == ["", "", ""]
