"""A Hugging Face tokenizer.json keeps the promises of the other kinds, and gives the ids that `tokenizers` gives."""

import json
import pickle
import random
import sys

import numpy as np
import pytest

import train
from minillm import generate, load
from minillm.data.config import DataConfig
from minillm.data.corpus import open_corpus
from minillm.data.store import open_prepared
from minillm.log import run_command
from minillm.tokenizer import HFTokenizer, TokenizerConfig, describe, load_tokenizer, train_tokenizer
from minillm.tokenizer.eval import Text, measure
from minillm.tokenizer.hf import byte_characters

hf = pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install 'minillm[hf]'")
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

WORDS = [
    *("the", "hen", "saw", "17", "red", "barns,", "and", "Tom's", "dog", "—", "old", "Rex", "ran", "home;"),
    *("小猫在河边看见了三条鱼。", "café", "naïve", "🙂", "👩\u200d👩\u200d👧", "don't", "a", "      ", "\n\n", "\tx"),
]
SPECIAL = ("<unk>", "<s>", "</s>", "[UNK]", "[CLS]", "[SEP]", "<|endoftext|>", "<think>", "<0x41>", "<|im_end|>")


CHINESE = "小猫在河边看见了三条鱼。"


def story(seed: int, n_words: int = 60) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice([" ", " ", ".\n"]) for _ in range(n_words))


CORPUS = [story(seed) for seed in range(60)]


def strings(n: int, seed: int, special: bool = True) -> list[str]:
    """Words and what breaks tokenizers, glued at random; with or without what spells special tokens."""
    rng = random.Random(seed)
    parts = [*WORDS, *"\0\r\x85\xa0\u200b\u2581\u3000\ufeff\ufffd<>|[]", " ", " ", *(SPECIAL if special else ())]
    found = [*SPECIAL, " </s> ", "</s></s>"] if special else ["", " ", "hen", " hen", "  hen", "\n"]
    while len(found) < n:
        points = rng.choices(range(0x110000), k=rng.choice([0, 0, 3]))
        text = "".join(rng.choices(parts, k=rng.randrange(1, 20)))
        text += "".join(chr(c) for c in points if not 0xD800 <= c <= 0xDFFF)
        if special or not any(name in text for name in SPECIAL):
            found.append(text)
    return found


# ---- tokenizers of each make


def byte_level() -> hf.Tokenizer:
    """As GPT-2's, with white space and <think> among the added tokens, as later ones have."""
    made = hf.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens(["<think>", hf.AddedToken("      ", normalized=False)])
    made.add_special_tokens(["<|im_end|>"])
    made.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", made.token_to_id("<|endoftext|>"))]
    )
    made.enable_truncation(5)
    return made


def byte_fallback() -> hf.Tokenizer:
    """As Llama 2's: spaces written as U+2581, one put before the text, bytes for what has no piece."""
    small = hf.Tokenizer(models.BPE())
    small.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    small.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, limit_alphabet=40, show_progress=False))
    learned = json.loads(small.to_str())
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["model"]["vocab"]]
    learned["model"] |= {
        "vocab": {name: id for id, name in enumerate(names)},
        **{"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True},
    }
    made = hf.Tokenizer.from_str(json.dumps(learned))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def unigram() -> hf.Tokenizer:
    """As XLM-R's: the special tokens are pieces of the model too, and the best ones."""
    made = hf.Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def word_piece() -> hf.Tokenizer:
    """As BERT's: case, accents and white space are lost."""
    made = hf.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return made


def words() -> hf.Tokenizer:
    """Words between white space, without a decoder."""
    made = hf.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=["[UNK]", "</s>"], show_progress=False))
    return made


def suffixed() -> hf.Tokenizer:
    """As GPT-1's: the end of a word is marked, not its beginning."""
    made = hf.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], end_of_word_suffix="</w>", show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


MAKES = {make.__name__: make for make in (byte_level, byte_fallback, unigram, word_piece, words, suffixed)}
KEEP_BYTES = {"byte_level"}  # any text comes back


@pytest.fixture(scope="module")
def made():
    return {name: make().to_str() for name, make in MAKES.items()}


@pytest.fixture(params=MAKES)
def pair(request, made):
    """(ours, theirs) of each make."""
    description = made[request.param]
    theirs = hf.Tokenizer.from_str(description)
    theirs.no_truncation()
    return HFTokenizer(description), theirs


@pytest.fixture
def folder(made, tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "tokenizer.json").write_text(made["byte_level"], encoding="utf-8")
    return tmp_path / "hub"


# ---- ids


def test_ids_are_those_of_tokenizers(pair):
    ours, theirs = pair
    for text in strings(2000, 0, special=False):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)
    assert ours.vocab_size == theirs.get_vocab_size()


def test_no_text_becomes_a_special_id(pair):
    ours, theirs = pair
    unknown = {id for name, id in ours.special_tokens.items() if name in ("<unk>", "[UNK]")}
    control = set(ours.special_tokens.values()) - unknown
    texts = strings(3000, 1)
    assert control
    assert any(control.intersection(theirs.encode(text, add_special_tokens=False).ids) for text in texts)
    for text in texts:
        assert control.isdisjoint(ours.encode(text)), repr(text)


def test_a_batch_encodes_as_each_text_alone_and_pickling_keeps_that(pair):
    ours, _ = pair
    texts, copy = strings(300, 2), pickle.loads(pickle.dumps(ours))
    arrays = ours.encode_arrays(texts)
    assert [ids.tolist() for ids in arrays] == ours.encode_batch(texts) == [ours.encode(text) for text in texts]
    assert {ids.dtype for ids in arrays} == {np.dtype("int32")}
    assert (copy.encode_batch(texts), copy.hash, copy.table) == (ours.encode_batch(texts), ours.hash, ours.table)
    assert (ours.encode_arrays([]), ours.encode("")) == ([], [])


def test_added_white_space_is_text(made):
    ours = HFTokenizer(made["byte_level"])
    theirs = hf.Tokenizer.from_str(made["byte_level"])
    assert ours.encode("a      b")[1] == theirs.token_to_id("      ")
    assert ours.token_bytes(theirs.token_to_id("      ")) == b"      "


def test_runs_of_the_mark_of_a_space_are_text_too(made):
    """As in Gemma, where they are in the model's vocabulary and among the added tokens."""
    definition = json.loads(made["byte_fallback"])
    model, id = definition["model"], len(definition["model"]["vocab"])
    model["vocab"]["▁▁"] = id
    model["merges"].insert(0, ["▁", "▁"])
    definition["added_tokens"].append(definition["added_tokens"][0] | {"id": id, "content": "▁▁", "special": False})
    ours = HFTokenizer(json.dumps(definition))
    assert id in ours.encode("a   b")
    assert ours.token_bytes(id) == b"  "


def test_what_has_a_meaning_but_is_not_marked_special_is_read_but_never_written(made):
    """<think>: no text spells it, and a model that says it is heard."""
    ours = HFTokenizer(made["byte_level"])
    id = ours.special_tokens["<think>"]
    assert id not in ours.encode("<think>")
    assert ours.decode([id]) == "<think>" == ours.decode(ours.encode("<think>"))


def test_the_same_text_has_the_same_ids_also_where_training_dropped_merges_at_random(made):
    definition = json.loads(made["byte_level"])
    definition["model"]["dropout"] = 0.5
    ours = HFTokenizer(json.dumps(definition))
    assert ours.encode_batch(CORPUS) == HFTokenizer(made["byte_level"]).encode_batch(CORPUS)


def test_a_word_that_stands_whole_in_the_vocabulary_is_no_way_to_a_special_id(made):
    """With ignore_merges, as in Llama 3, a word is looked up before it is merged."""
    definition = json.loads(made["byte_level"])
    definition["model"]["ignore_merges"] = True
    definition["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    assert definition["model"]["vocab"]["<|endoftext|>"] == 0
    ours = HFTokenizer(json.dumps(definition))
    assert 0 not in ours.encode("<|endoftext|>")
    assert ours.decode(ours.encode("<|endoftext|>")) == "<|endoftext|>"


def test_half_a_surrogate_pair_is_refused_by_position(pair):
    ours, _ = pair
    with pytest.raises(ValueError, match=r"^character 3 is U\+D83D, half of a surrogate pair"):
        ours.encode("hen\ud83d")
    with pytest.raises(ValueError, match=r"^text 1: character 0 is U\+DC00"):
        ours.encode_batch(["hen", "\udc00"])


# ---- bytes


def test_bytes_of_tokens_are_the_bytes_of_the_text(pair, request):
    ours, _ = pair
    name = request.node.callspec.params["pair"]
    for text in strings(2000, 3):
        ids = ours.encode(text)
        inside = b"".join(map(ours.token_bytes, ids))
        if name in KEEP_BYTES:
            assert inside == text.encode()
        assert ours.decode(ids) == inside.decode("utf-8", "replace").removeprefix(" " * ours.adds_space)


def test_any_text_comes_back_from_byte_level_and_from_byte_fallback(made):
    exact, marked = HFTokenizer(made["byte_level"]), HFTokenizer(made["byte_fallback"])
    for text in strings(3000, 4):
        assert exact.decode(exact.encode(text)) == text
        assert marked.decode(marked.encode(text)) == text.replace("\u2581", " ")  # its mark of a space


def test_text_is_decoded_as_tokenizers_decodes_it(pair, request):
    ours, theirs = pair
    for text in strings(1000, 5, special=False):
        ids = ours.encode(text)
        theirs_text = theirs.decode(ids)
        if request.node.callspec.params["pair"] == "word_piece":  # it mends white space before punctuation afterwards
            assert ours.decode(ids).replace(" ", "") == theirs_text.replace(" ", "")
        else:
            assert ours.decode(ids).rstrip(" ") == theirs_text.rstrip(" ")


def test_only_a_tokenizer_that_adds_a_space_says_so(made):
    adds = {name: HFTokenizer(description).adds_space for name, description in made.items()}
    assert adds == {
        **{"byte_level": False, "byte_fallback": True, "unigram": True, "word_piece": True},
        **{"words": True, "suffixed": False},
    }


def test_the_table_of_byte_characters_is_that_of_gpt2():
    table = byte_characters()
    assert sorted(table) == sorted(pre_tokenizers.ByteLevel.alphabet())
    whole = "".join(chr(point) for point in range(0x800))
    written = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(whole)[0][0]
    assert bytes(table[character] for character in written) == whole.encode()


# ---- what begins and ends a document


NAMED = {"content": "<|im_end|>", "special": True}


@pytest.mark.parametrize(
    ("config", "begins", "ends", "pads"),
    [
        ({}, "<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),  # GPT-2: one token for everything
        ({"bos_token": None, "eos_token": NAMED}, "<|im_end|>", "<|im_end|>", "<|im_end|>"),  # Qwen: nothing begins
        (
            {"bos_token": "<|im_end|>", "eos_token": "<|endoftext|>", "pad_token": "<think>"},
            *("<|im_end|>", "<|endoftext|>", "<think>"),
        ),
        ({"bos_token": "<not there>"}, "<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    ],
)
def test_the_config_beside_it_names_what_begins_ends_and_pads(folder, config, begins, ends, pads):
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.special_tokens
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (ids[begins], ids[ends], ids[pads])


def test_what_begins_and_ends_is_part_of_the_hash(folder):
    before = load_tokenizer(folder).hash
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    assert load_tokenizer(folder).hash != before
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "model_max_length": 9}))
    assert load_tokenizer(folder).hash == before


def test_the_hash_is_of_the_content_not_of_its_layout(made):
    again = json.dumps(json.loads(made["unigram"]), indent=3, ensure_ascii=False)
    assert again != made["unigram"]
    assert HFTokenizer(again).hash == HFTokenizer(made["unigram"]).hash
    assert len({HFTokenizer(description).hash for description in made.values()}) == len(MAKES)


# ---- files


def test_it_is_recognised_by_its_content_as_a_folder_and_as_a_file(folder):
    for path in (folder, folder / "tokenizer.json"):
        for config in (TokenizerConfig(path=str(path)), TokenizerConfig(kind="hf", path=str(path))):
            assert train_tokenizer((), config).kind == "hf"
    assert "hf" in describe(load_tokenizer(folder))


def test_saved_it_is_the_same_file_and_keeps_what_the_config_said(folder, tmp_path):
    config = {"eos_token": "<|im_end|>", "bos_token": None, "model_max_length": 100}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = load_tokenizer(folder)
    tokenizer.save(tmp_path / "run")
    saved = load_tokenizer(tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert (saved.hash, saved.eos_id, saved.special_tokens) == (
        tokenizer.hash,
        tokenizer.eos_id,
        tokenizer.special_tokens,
    )
    written = json.loads((tmp_path / "run" / "tokenizer_config.json").read_text())
    assert written == config | {"chat_template": "{{ messages }}", "pad_token": None}


def test_transformers_reads_what_is_saved(folder, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = load_tokenizer(folder)
    tokenizer.save(tmp_path / "run")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "run")
    assert theirs.eos_token_id == tokenizer.eos_id
    for text in CORPUS[:20]:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)


def test_mistakes_are_named(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="path: kind hf needs the folder of a Hugging Face tokenizer"):
        TokenizerConfig(kind="hf")
    with pytest.raises(ValueError, match="vocab_size: 512 was given, but kind hf has a size of its own"):
        TokenizerConfig(kind="hf", path=str(folder), vocab_size=512)
    train_tokenizer((), TokenizerConfig(kind="byte")).save(tmp_path / "bytes")
    with pytest.raises(ValueError, match=r"hf was given, but the tokenizer in .* is of kind byte"):
        train_tokenizer((), TokenizerConfig(kind="hf", path=str(tmp_path / "bytes")))
    (tmp_path / "notes.txt").write_text("no tokenizer")
    with pytest.raises(ValueError, match=r"notes\.txt: is no tokenizer\.json"):
        load_tokenizer(tmp_path / "notes.txt")
    description = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(description | {"decoder": {"type": "Nonsense"}}))
    with pytest.raises(ValueError, match=r"tokenizer\.json: tokenizers .* cannot read it"):
        load_tokenizer(folder)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"needs the package tokenizers: pip install 'minillm\[hf\]'"):
        load_tokenizer(folder)


# ---- from text to a trained model


def rows(path, n=300):
    path.write_text("".join(json.dumps({"text": story(seed, 20)}) + "\n" for seed in range(n)))
    return path


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_are_prepared_between_their_marks(made, folder, tmp_path, workers):
    path = rows(tmp_path / "rows.jsonl")
    data = DataConfig(path=str(path), cache_dir=str(tmp_path / "cache"), workers=workers, val="0")
    tokenizer, ((_, _, prepared),) = open_corpus(data, TokenizerConfig(kind="hf", path=str(folder)))
    store = prepared.train
    starts = [*store.document_offsets.tolist()[: store.n_documents], store.n_tokens]
    for seed in (0, 150, 299):
        ids = store.tokens(starts[seed], starts[seed + 1]).tolist()
        assert ids == [tokenizer.eos_id, *tokenizer.encode(story(seed, 20)), tokenizer.eos_id]  # nothing begins: eos
    assert load_tokenizer(prepared.directory).hash == tokenizer.hash
    assert open_prepared(prepared.directory, tokenizer.hash).train.vocab_size == tokenizer.vocab_size


def test_ids_beyond_65535_are_kept(made, folder, tmp_path):
    definition = json.loads(made["byte_level"])
    vocabulary = definition["model"]["vocab"]
    vocabulary |= {token["content"]: token["id"] for token in definition["added_tokens"]}
    vocabulary |= {f"\u0100{id}": id for id in range(len(vocabulary), 70_000)}
    vocabulary["henhen"] = 70_000
    definition["model"]["merges"] += [["hen", "hen"]]
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "hens.txt").write_text("henhen hen\n" * 50)
    data = DataConfig(path=str(tmp_path / "hens.txt"), cache_dir=str(tmp_path / "cache"), val="0")
    tokenizer, ((_, _, prepared),) = open_corpus(data, TokenizerConfig(path=str(folder)))
    ids = prepared.train.tokens(0, prepared.train.n_tokens).tolist()
    assert 70_000 in ids
    assert tokenizer.decode(ids) == "henhen hen\n" * 50


@pytest.mark.parametrize("make", ["byte_level", "byte_fallback", "metaspace"])
def test_a_long_document_has_no_space_added_where_it_is_cut(made, folder, tmp_path, make):
    definition = json.loads(made["byte_level" if make == "byte_level" else "byte_fallback"])
    if make == "metaspace":  # as Llama's is written since tokenizers 0.19
        definition["normalizer"] = None
        definition["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        }
    if make == "byte_level":
        definition["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    text = " ".join(f"hen {number} ran" for number in range(20_000)) + CHINESE * 5000
    (tmp_path / "long.txt").write_text(text)
    data = DataConfig(path=str(tmp_path / "long.txt"), cache_dir=str(tmp_path / "cache"), val="0", workers=1)
    tokenizer, ((_, _, prepared),) = open_corpus(data, TokenizerConfig(path=str(folder)))
    assert tokenizer.adds_space
    assert tokenizer.decode(prepared.train.tokens(0, prepared.train.n_tokens)) == text


def test_a_tokenizer_without_an_end_cannot_prepare_documents(made, folder, tmp_path):
    definition = json.loads(made["words"])
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] == "[UNK]"]
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("the hen saw")) == "the hen saw"
    data = DataConfig(path=str(rows(tmp_path / "rows.jsonl", 5)), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="no token to end a document with; name one of its vocabulary as eos_token"):
        open_corpus(data, TokenizerConfig(path=str(folder)))


def test_a_model_is_trained_loaded_and_continued_with_it(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows(tmp_path / "rows.jsonl")
    words = ["--data.path", "rows.jsonl", "--data.seq_len", "32", "--model.dim", "16", "--model.n_layers", "1"]
    words += ["--model.n_heads", "2", "--train.batch_tokens", "128", "--run.dir", "run", "--run.resume", "auto"]
    tokenizer = ["--tokenizer.kind", "hf", "--tokenizer.path", str(folder)]
    assert run_command(train.main, [*words, *tokenizer, "--train.max_steps", "2"]) == 0
    assert run_command(train.main, ["--run.dir", "run", "--run.resume", "auto", "--train.max_steps", "3"]) == 0
    capsys.readouterr()
    model, loaded = load("run")
    assert loaded.hash == load_tokenizer(folder).hash
    assert generate(model, loaded, "the hen").text


def test_a_tokenizer_that_loses_text_works_and_eval_says_so(made):
    [found] = measure([HFTokenizer(made["word_piece"])], [Text("The  hen ☃", "a.txt", 7), Text("the hen", "a.txt", 8)])
    assert (found.total.texts, found.total.lost, found.total.unknown) == (2, 1, 1)
    assert found.losses == ["a.txt:7: character 0: 'The  hen ☃' comes back as 'the hen'"]


# ---- the real one


TEXTS = ["wiki_en.txt", "pride_and_prejudice.txt", "tang_poems.jsonl", "alpaca_zh.json", "c4.jsonl"]


@pytest.mark.parametrize("name", TEXTS)
def test_real_text_has_the_ids_that_transformers_gives(real_data, name):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.AutoTokenizer.from_pretrained(real_data / "hf_tokenizer")
    ours = load_tokenizer(real_data / "hf_tokenizer")
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    for text in (real_data / name).read_text(encoding="utf-8")[:300_000].splitlines(keepends=True)[:100]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert b"".join(map(ours.token_bytes, ids)) == text.encode()
        assert ours.decode(ids) == text == theirs.decode(ids)
