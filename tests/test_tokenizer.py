import codecs
import json
import logging
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest

from minillm.tokenizer import (
    SPECIAL_TOKENS,
    ByteTokenizer,
    CharTokenizer,
    TokenizerConfig,
    choose_vocab_size,
    describe,
    load_tokenizer,
    train_tokenizer,
)
from minillm.tokenizer.train import CHUNK, sample_items, split_text

WORDS = [
    *("the", "hen", "saw", "17", "red", "barns,", "and", "Tom's", "dog", "—", "old", "Rex", "ran", "home;"),
    *("小猫在河边看见了三条鱼。", "café", "naïve", "🙂", "👩\u200d👩\u200d👧"),
]
NASTY = [
    *"\0\t\n\r\x0b\x1f \x7f\x85\xa0\u200b\u200d\u2028\u2029\u2047\u2581\u2582\u2585\u3000\ufeff\ufffd\ufffe\uffff",
    *"é\u0301가各𝒳🙂\U0010ffff<>|[]\\^-",
    *("\r\n", "   ", "▁▁", " ▁ ", "\n\n\n", "0x41", "<0x41>", "<0xE2><0x96>", "1234567890"),
    *SPECIAL_TOKENS,
]


def story(rng: random.Random, n_words: int) -> str:
    return "".join(rng.choice(WORDS) + rng.choice([" ", " ", " ", ".\n", "\n\n"]) for _ in range(n_words))


CORPUS = [story(random.Random(seed), 200) for seed in range(40)]


def strings(n: int, seed: int) -> list[str]:
    """Words and what breaks tokenizers, glued at random; and any characters that Unicode has."""
    rng = random.Random(seed)
    found = ["", *NASTY]
    while len(found) < n:
        parts = rng.choices([*NASTY, *WORDS, " ", " ", "\n"], k=rng.randrange(1, 30))
        if rng.random() < 0.3:
            parts += [chr(c) for c in rng.choices(range(0x110000), k=5) if not 0xD800 <= c <= 0xDFFF]
        found.append("".join(parts))
    return found


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(CORPUS, TokenizerConfig(vocab_size=512))


@pytest.fixture(scope="module")
def char():
    return train_tokenizer([*CORPUS, "".join(strings(5000, 0))], TokenizerConfig(kind="char"))


@pytest.fixture(params=["bpe", "char", "byte"])
def tokenizer(request, bpe, char):
    return {"bpe": bpe, "char": char, "byte": ByteTokenizer()}[request.param]


# ---- what every kind promises


def test_any_text_comes_back_and_no_text_becomes_a_special_id(tokenizer):
    texts = strings(5000, 0)
    batch = tokenizer.encode_batch(texts)
    special = set(tokenizer.special_tokens.values())
    for text, ids in zip(texts, batch):
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert special.isdisjoint(ids), text
        assert all(0 <= id < tokenizer.vocab_size for id in ids)


def test_a_batch_encodes_as_each_text_alone(tokenizer):
    texts = strings(500, 0)
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.encode("") == []


def test_arrays_hold_the_ids_of_the_lists(tokenizer):
    texts = strings(500, 0)
    arrays = tokenizer.encode_arrays(texts)
    assert [ids.tolist() for ids in arrays] == tokenizer.encode_batch(texts)
    assert {ids.dtype for ids in arrays} == {np.dtype("int32")}
    assert tokenizer.encode_arrays([]) == []


def test_special_tokens_stand_at_the_same_ids_in_every_kind(tokenizer):
    assert tokenizer.special_tokens == {name: id for id, name in enumerate(SPECIAL_TOKENS)}
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)
    assert len(SPECIAL_TOKENS) == 16
    assert all(tokenizer.token_bytes(id) == b"" for id in tokenizer.special_tokens.values())


def test_decode_leaves_special_tokens_out_or_shows_their_names(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("hen"), tokenizer.eos_id, 0]
    assert tokenizer.decode(ids) == "hen"
    assert tokenizer.decode(ids, skip_special=False) == "<s>hen</s><unk>"


def test_decode_refuses_ids_outside_the_vocabulary(tokenizer):
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"{wrong} is outside the vocabulary, 0 to {tokenizer.vocab_size - 1}"):
            tokenizer.decode([1, wrong])


@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_a_character_cut_in_half_decodes_to_the_replacement_character(kind, bpe):
    tokenizer = bpe if kind == "bpe" else ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("龘")[:-1]) == "\ufffd"
    assert tokenizer.decode([*tokenizer.encode("龘")[1:], *tokenizer.encode("hen")]).endswith("hen")


def test_bytes_of_tokens_stream_through_an_incremental_decoder(tokenizer):
    text = "".join(strings(300, 0))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = [decoder.decode(tokenizer.token_bytes(id)) for id in tokenizer.encode(text)]
    assert "".join(pieces) + decoder.decode(b"", final=True) == text


def test_half_a_surrogate_pair_is_refused_by_position(tokenizer):
    with pytest.raises(ValueError, match=r"^character 3 is U\+D83D, half of a surrogate pair"):
        tokenizer.encode("hen\ud83d")
    with pytest.raises(ValueError, match=r"^text 1: character 0 is U\+DC00"):
        tokenizer.encode_batch(["hen", "\udc00 \u2581"])


def test_one_string_is_no_batch(tokenizer):
    with pytest.raises(TypeError, match="a list of texts is expected"):
        tokenizer.encode_batch("hen")


def test_pickling_keeps_everything_and_stays_small(tokenizer):
    data = pickle.dumps(tokenizer)
    copy = pickle.loads(data)
    text = "".join(strings(200, 0))
    assert len(data) < 300_000
    assert (copy.hash, copy.vocab_size, copy.encode(text)) == (
        tokenizer.hash,
        tokenizer.vocab_size,
        tokenizer.encode(text),
    )


# ---- files


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "run")
    text = "".join(strings(200, 0))
    for loaded in (load_tokenizer(tmp_path / "new" / "run"), load_tokenizer(str(tmp_path / "new" / "run"))):
        assert (loaded.kind, loaded.hash, loaded.vocab_size) == (tokenizer.kind, tokenizer.hash, tokenizer.vocab_size)
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.special_tokens == tokenizer.special_tokens
    files = sorted(path.name for path in (tmp_path / "new" / "run").iterdir())
    assert files == (["tokenizer.json", "tokenizer.model"] if tokenizer.kind == "bpe" else ["tokenizer.json"])


def test_a_checkpoint_of_a_run_leads_to_the_tokenizer_of_the_run(bpe, tmp_path, monkeypatch):
    bpe.save(tmp_path)
    checkpoint = tmp_path / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    assert load_tokenizer(checkpoint).hash == bpe.hash
    monkeypatch.chdir(checkpoint)
    assert load_tokenizer(".").hash == bpe.hash


def test_the_hash_tells_tokenizers_apart(bpe, char):
    other = train_tokenizer(CORPUS, TokenizerConfig(vocab_size=511))
    fewer = CharTokenizer("abc")
    hashes = {t.hash for t in (bpe, char, other, fewer, CharTokenizer("abd"), ByteTokenizer())}
    assert len(hashes) == 6
    assert CharTokenizer("cba").hash == fewer.hash
    assert all(len(h) == 64 for h in hashes)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("damage", ["bit", "truncated", "missing"])
def test_a_damaged_file_is_named(bpe, tmp_path, name, damage):
    bpe.save(tmp_path)
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes(data if damage == "bit" else data[: len(data) // 2])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_tokenizer(tmp_path)


def test_edited_characters_and_unknown_kinds_are_refused(char, tmp_path):
    char.save(tmp_path)
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(description | {"characters": "ab"}))
    with pytest.raises(ValueError, match=r"tokenizer\.json: damaged or edited"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=rf"{path}: no tokenizer\.json there"):
            load_tokenizer(path)


def test_saving_where_a_file_stands_is_refused(bpe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="a file is where a directory is needed"):
        bpe.save(tmp_path / "file" / "run")


def test_a_path_in_the_config_loads_instead_of_training(bpe, char, tmp_path):
    char.save(tmp_path)
    loaded = train_tokenizer(iter(()), TokenizerConfig(path=str(tmp_path)))
    assert (loaded.kind, loaded.hash) == ("char", char.hash)
    with pytest.raises(ValueError, match=f"vocab_size: 512 was given, but the tokenizer in .* has {char.vocab_size}"):
        train_tokenizer(iter(()), TokenizerConfig(path=str(tmp_path), vocab_size=512))


# ---- char


def test_char_is_the_sorted_characters_of_the_corpus():
    tokenizer = train_tokenizer(iter(["cab", "é\n"]), TokenizerConfig(kind="char"))
    assert tokenizer.vocab_size == 16 + 5
    assert tokenizer.encode("\nabcé") == [16, 17, 18, 19, 20]


def test_char_refuses_an_unseen_character_by_position():
    tokenizer = CharTokenizer("abc\n")
    with pytest.raises(ValueError, match=r"^character 4 is 'é' \(U\+00E9\), not one of the 4 characters"):
        tokenizer.encode("ab\ncé")
    with pytest.raises(ValueError, match=r"^text 1: character 2 is '\\u2581' \(U\+2581\)|^text 1: character 2 is '▁'"):
        tokenizer.encode_batch(["abc", "ab▁é"])


# ---- BPE: what is learned


def test_bpe_compresses_and_has_the_size_asked_for(bpe):
    text = "\n".join(CORPUS)
    assert bpe.vocab_size == 512
    assert len(bpe.encode(text)) < 0.4 * len(text.encode())


def test_bpe_spells_numbers_digit_by_digit(bpe):
    assert [bpe.token_bytes(id) for id in bpe.encode("171")] == [b"1", b"7", b"1"]


def test_the_same_corpus_gives_the_same_tokenizer_in_another_process(bpe, tmp_path):
    (tmp_path / "corpus.json").write_text(json.dumps(CORPUS))
    program = (
        "import json\nfrom minillm.tokenizer import *\n"
        "corpus = json.load(open('corpus.json'))\n"
        "for kind in 'bpe', 'char':\n"
        "    print(train_tokenizer(corpus, TokenizerConfig(kind, None, 512 if kind == 'bpe' else None)).hash)"
    )
    char = train_tokenizer(CORPUS, TokenizerConfig(kind="char"))
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert run.stdout.split() == [bpe.hash, char.hash]
    assert run.stderr == ""


def test_sentencepiece_says_nothing_of_its_own(capfd):
    train_tokenizer(["a long line " * 2000, "x" * 9000, "▅", ""], TokenizerConfig(vocab_size=300)).encode("hen\0▅")
    assert capfd.readouterr() == ("", "")


def test_a_line_longer_than_the_trainers_limit_is_learned_from():
    """sentencepiece drops items above max_sentence_length; here everything but "tiny" is in one such line."""
    line = "harvest moonlight " * 2000
    tokenizer = train_tokenizer(["tiny", line], TokenizerConfig(vocab_size=320))
    assert len(tokenizer.encode(" harvest moonlight")) == 2


@pytest.mark.parametrize("poison", ["▅", "\0", "▁", "\x07"])
def test_a_character_sentencepiece_cannot_learn_costs_only_itself(poison):
    """An item with U+2585 is dropped whole by the trainer; a corpus of one document would be empty."""
    tokenizer = train_tokenizer([f"harvest{poison} moonlight " * 50], TokenizerConfig(vocab_size=320))
    assert len(tokenizer.encode(" moonlight")) == 1
    assert tokenizer.decode(tokenizer.encode(f"harvest{poison} moon")) == f"harvest{poison} moon"


def test_special_text_in_the_corpus_does_not_become_a_piece():
    corpus = ["<s> hello </s> <|im_start|> <0x41> <unk>"] * 100
    tokenizer = train_tokenizer(corpus, TokenizerConfig(vocab_size=400))
    assert set(tokenizer.encode(corpus[0])).isdisjoint(tokenizer.special_tokens.values())
    assert tokenizer.decode(tokenizer.encode(corpus[0])) == corpus[0]


def test_a_vocabulary_too_large_for_the_corpus_is_lowered_with_a_notice(caplog):
    with caplog.at_level(logging.WARNING, "minillm"):
        tokenizer = train_tokenizer(["ab ab ab"], TokenizerConfig(vocab_size=50_000))
    assert 273 < tokenizer.vocab_size < 300
    assert f"lowered from 50000 to {tokenizer.vocab_size}" in caplog.text


def test_more_characters_than_places_leaves_half_the_places_for_merges():
    rng = random.Random(0)
    rare = "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(5000))
    tokenizer = train_tokenizer([rare, *CORPUS], TokenizerConfig(vocab_size=400))
    pieces = [tokenizer.token_bytes(id).decode() for id in range(272, 400)]
    assert tokenizer.vocab_size == 400
    assert sum(len(piece) == 1 for piece in pieces) == 64
    assert tokenizer.decode(tokenizer.encode(rare)) == rare


@pytest.mark.parametrize("vocab_size", [300, 301, 310])
def test_the_smallest_vocabularies_work(vocab_size):
    tokenizer = train_tokenizer(CORPUS, TokenizerConfig(vocab_size=vocab_size))
    assert tokenizer.vocab_size <= vocab_size
    assert tokenizer.decode(tokenizer.encode(CORPUS[0])) == CORPUS[0]


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_an_empty_corpus_is_refused(kind):
    for corpus in ([], [""], ["", ""]):
        with pytest.raises(ValueError, match="the corpus is empty"):
            train_tokenizer(iter(corpus), TokenizerConfig(kind=kind))


@pytest.mark.parametrize("text", ["\n\n", "   ", "\0", "▅", "▁"])
def test_a_corpus_without_anything_to_learn_is_refused(text):
    with pytest.raises(ValueError, match="the corpus is empty: there is no text"):
        train_tokenizer([text] * 3, TokenizerConfig())


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_half_a_surrogate_pair_in_the_corpus_is_refused_by_document(kind):
    with pytest.raises(ValueError, match=r"^document 1: character 5002 is U\+D800"):
        train_tokenizer(["fine", "x " * 2501 + "\ud800"], TokenizerConfig(kind=kind))


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"vocab_size: 299 is too small; .* at least 300"):
        TokenizerConfig(vocab_size=299)
    with pytest.raises(ValueError, match="vocab_size: 512 was given, but kind char"):
        TokenizerConfig(kind="char", vocab_size=512)


# ---- the parts


def test_long_text_encodes_as_sentencepiece_encodes_the_whole(bpe):
    rng = random.Random(1)
    texts = ["".join(rng.choice([*WORDS, " ", " ", "\n", "    "]) for _ in range(5000)), "x" * 20_000, " " * 20_000]
    texts += [texts[0] + "x" * 9000 + texts[0]]
    assert bpe.encode_batch(texts) == bpe.processor.encode(texts)


def test_training_items_are_the_text_cut_at_line_and_word_starts():
    rng = random.Random(2)
    text = "".join(rng.choice(["word", "字", "🙂", " ", " ", "\n"]) for _ in range(50_000)) + "x" * 10_000
    items = list(split_text(text))
    assert "".join(items) == text
    assert max(map(len, items)) <= CHUNK
    assert max(len(item.encode()) for item in items) <= 4 * CHUNK
    assert all(item[0] == "\n" for item in items[1:-3])
    assert next(split_text("a" * 3000 + " " + "b" * 3000)) == "a" * 3000


def test_the_sample_is_bounded_and_spread_over_the_corpus():
    documents = [f"{i:06d} " + "x" * 93 for i in range(20_000)]
    held = []

    def one_pass():
        yield from documents

    items, sampled, total = sample_items(one_pass(), 200_000)
    assert total == 2_000_000
    assert 0.8 * 200_000 < sampled <= 200_000
    assert sampled == sum(map(len, items))
    held = [int(item[:6]) for item in items]
    assert held == sorted(held)
    for start in range(0, 20_000, 1000):  # each twentieth of the corpus gives about a twentieth of the sample
        assert 70 <= sum(start <= i < start + 1000 for i in held) <= 130
    assert sample_items(one_pass(), 200_000) == (items, sampled, total)


def test_training_on_a_sample_says_so(caplog):
    corpus = [story(random.Random(seed), 100) for seed in range(300)]
    with caplog.at_level(logging.INFO, "minillm"):
        tokenizer = train_tokenizer(corpus, TokenizerConfig(vocab_size=400, train_bytes=100_000))
    assert "training on a sample, 0.1 MB spread over the 0.2 MB of the corpus" in caplog.text
    assert tokenizer.vocab_size == 400


def test_the_chosen_vocabulary_grows_with_the_corpus_and_its_script():
    sizes = [choose_vocab_size(10**n, 80) for n in range(4, 13)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == sizes[-2] <= 65_536
    assert choose_vocab_size(10**6, 3000) > choose_vocab_size(10**6, 80)
    assert train_tokenizer(CORPUS, TokenizerConfig()).vocab_size <= choose_vocab_size(10**6, 200)


def test_description_holds_what_a_person_asks_for(tokenizer):
    lines = describe(tokenizer)
    for expected in (tokenizer.kind, tokenizer.hash, f"{tokenizer.vocab_size:,} ids", "2 </s>", "ends with 2"):
        assert expected in lines


# ---- real text


@pytest.mark.parametrize("name", ["wiki_en.txt", "pride_and_prejudice.txt", "tang_poems.jsonl"])
def test_real_text_comes_back(real_data, name):
    text = (real_data / name).read_text(encoding="utf-8")[:1_000_000]
    tokenizer = train_tokenizer([text], TokenizerConfig())
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < 0.45 * len(text.encode())
