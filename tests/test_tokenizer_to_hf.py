"""Our own kinds, written as Hugging Face's files: `tokenizers` and transformers give our ids and our text."""

import json
import random
import re

import pytest

from minillm.tokenizer import SPECIAL_TOKENS, ByteTokenizer, CharTokenizer, TokenizerConfig, load_tokenizer
from minillm.tokenizer import train_tokenizer as train
from minillm.tokenizer.to_hf import hugging_face_files, last_merge, merges_of

hf = pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install 'minillm[hf]'")

WORDS = [
    *("the", "hen", "saw", "17", "red", "barns,", "and", "Tom's", "dog", "—", "old", "Rex", "ran", "home;"),
    *("小猫在河边看见了三条鱼。", "café", "naïve", "🙂", "👩\u200d👩\u200d👧", "aaaa", "abab", "banana"),
]
BREAKING = [
    *"\0\t\n\r\x0b\x1f \x7f\x85\xa0\u200b\u200d\u2028\u2581\u2585\u3000\ufeff\ufffd\uffffé\u0301𝒳<>|[]\\",
    *("\r\n", "   ", "      ", "▁▁", " ▁ ", "\n\n\n", "<0x41>", "<0xE2><0x96>", "1234567890", "<s", "<|im_start"),
]


def joined(n: int, seed: int, *, special: bool = False) -> list[str]:
    """Words and what breaks tokenizers, glued at random; perhaps with text that spells special tokens."""
    rng = random.Random(seed)
    parts = [*WORDS, *BREAKING, " ", " ", " ", "\n", *(SPECIAL_TOKENS if special else ())]
    texts = ["".join(rng.choices(parts, k=rng.randrange(30))) for _ in range(n)]
    texts += ["".join(rng.choices("ab \n▁", k=60)) for _ in range(n // 10)]  # where pieces overlap most
    points = ([c for c in rng.choices(range(0x110000), k=20) if not 0xD800 <= c <= 0xDFFF] for _ in range(n // 10))
    return texts + ["".join(map(chr, line)) for line in points]


def spells_special(text: str) -> bool:
    return any(name in text for name in SPECIAL_TOKENS)


TEXTS = [text for text in joined(2000, 0) if not spells_special(text)]
CORPUS = joined(300, 1)
SPELLED = [*SPECIAL_TOKENS, *(text for text in joined(500, 2, special=True) if spells_special(text))]


def write(tokenizer, folder, **options):
    for name, content in hugging_face_files(tokenizer, **options).items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.fixture(scope="module")
def bpe():
    return train(CORPUS, TokenizerConfig(vocab_size=700))


@pytest.fixture(scope="module", params=["bpe", "char", "byte"])
def ours(request, bpe):
    seen = "".join([*TEXTS, *SPELLED])
    return {"bpe": bpe, "char": CharTokenizer(seen), "byte": ByteTokenizer()}[request.param]


@pytest.fixture(scope="module")
def folder(ours, tmp_path_factory):
    return write(ours, tmp_path_factory.mktemp(ours.kind), max_seq_len=100_000)


@pytest.fixture(scope="module")
def theirs(folder):
    return hf.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def auto(folder):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers.AutoTokenizer.from_pretrained(folder)


# --- ids and text -----------------------------------------------------------------------------------------------------


def test_tokenizers_gives_our_ids_and_our_text(ours, theirs):
    for text, ids in zip(TEXTS, ours.encode_batch(TEXTS)):
        assert theirs.encode(text, add_special_tokens=False).ids == ids, repr(text)
        assert theirs.decode(ids) == text
    assert theirs.get_vocab_size() == ours.vocab_size
    assert {theirs.id_to_token(id): id for id in range(16)} == ours.special_tokens


def test_transformers_gives_our_ids_and_our_text(ours, auto):
    for text, ids in zip(TEXTS[:500], ours.encode_batch(TEXTS[:500])):
        assert auto.encode(text, add_special_tokens=False) == ids, repr(text)
        assert auto(text).input_ids == [ours.bos_id, *ids]  # as generate and training documents begin
        assert auto.decode([ours.bos_id, *ids, ours.eos_id, ours.pad_id], skip_special_tokens=True) == text
    assert (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert (len(auto), auto.model_max_length) == (ours.vocab_size, 100_000)


def test_read_back_it_encodes_and_decodes_any_text_as_before(ours, folder):
    back = load_tokenizer(folder)
    texts = [*TEXTS, *SPELLED]
    assert back.encode_batch(texts) == ours.encode_batch(texts)
    assert [back.decode(ids) for ids in ours.encode_batch(texts)] == texts
    assert (back.bos_id, back.eos_id, back.pad_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert (back.special_tokens, back.table) == (ours.special_tokens, ours.table)


@pytest.mark.parametrize("name", ["wiki_en.txt", "pride_and_prejudice.txt", "tang_poems.jsonl", "alpaca_zh.json"])
def test_real_text_has_the_same_ids(real_data, tmp_path, name):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    text = (real_data / name).read_text(encoding="utf-8")[:300_000]
    ours = train([text], TokenizerConfig(vocab_size=4000))
    theirs = transformers.AutoTokenizer.from_pretrained(write(ours, tmp_path))
    ids = theirs.encode(text, add_special_tokens=False)
    assert ids == ours.encode(text)
    assert theirs.decode(ids) == text


# --- where they differ, and nowhere else ------------------------------------------------------------------------------


def test_text_that_spells_a_special_token_is_one_there_and_text_here(ours, theirs):
    control = set(ours.special_tokens.values())
    names = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")
    for text in SPELLED:
        found = theirs.encode(text, add_special_tokens=False).ids
        assert control.isdisjoint(ours.encode(text))
        assert not control.isdisjoint(found)
        expected = []
        for part in names.split(text):
            expected += [ours.special_tokens[part]] if part in SPECIAL_TOKENS else ours.encode(part)
        assert found == expected  # between those tokens, our ids


def test_a_character_that_was_not_seen_is_unknown_there_and_an_error_here(tmp_path):
    ours = CharTokenizer("abc")
    theirs = hf.Tokenizer.from_file(str(write(ours, tmp_path) / "tokenizer.json"))
    assert theirs.encode("abxyc", add_special_tokens=False).ids == [16, 17, 0, 0, 18]
    with pytest.raises(ValueError, match="character 2 is 'x'"):
        ours.encode("abxyc")


def test_bytes_that_are_no_text_decode_to_another_number_of_replacement_characters(theirs, ours):
    if ours.kind == "char":
        return
    cut = ours.encode("龘")[:-1]
    assert (ours.decode(cut), theirs.decode(cut)) == ("\ufffd", "\ufffd\ufffd")


# --- the files --------------------------------------------------------------------------------------------------------


def test_each_piece_has_one_merge_the_one_that_makes_it():
    pieces = ["ab", "bc", "abc", "bcd", "abcd", "zz", "ay", "bx"]
    # abc is ab and c, for ab comes first; abcd is abc and d; bcd, in itself, bc and d
    expected = [["a", "b"], ["b", "c"], ["ab", "c"], ["bc", "d"], ["abc", "d"], ["z", "z"], ["a", "y"], ["b", "x"]]
    assert merges_of(pieces) == expected
    assert last_merge("abcx", {"abcx": 0}) is None
    assert last_merge("a", {"a": 0}) is None


def test_one_of_hugging_faces_is_written_as_it_came(ours, folder, tmp_path):
    theirs = load_tokenizer(folder)
    files = hugging_face_files(theirs, max_seq_len=7)
    assert files["tokenizer.json"] == (folder / "tokenizer.json").read_text(encoding="utf-8")
    assert json.loads(files["tokenizer_config.json"])["model_max_length"] == 100_000


def test_sentencepieces_own_file_comes_along(bpe):
    assert hugging_face_files(bpe)["tokenizer.model"] == bpe.model
