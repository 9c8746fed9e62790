"""Hugging Face's tokenizer.json through the package `tokenizers` (extra hf), with the promises of the other kinds.

The ids of a text are those that `tokenizers` gives without special tokens, but for text that spells one: there the
encoder knows no such token. What each id adds to the text is known too, as bytes, so that it can be streamed and
counted. What the tokenizer itself does not keep of a text (case, some white space) does not come back.

    tokenizer.json --+-- without its special tokens --> the encoder: text to ids
                     +-- as it is, asked once about every id --> the table: ids to bytes
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from minillm.files import read_json
from minillm.tokenizer.kinds import SPACE_MARK, TableTokenizer, listed, place, refuse_surrogates

# The names that published tokenizers use, most certain first; asked where tokenizer_config.json does not say.
WELL_KNOWN = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<｜begin▁of▁sentence｜>", "[CLS]"),
    "eos_token": ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<|im_end|>", "[SEP]"),
    "pad_token": ("<pad>", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "[PAD]"),
}
BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class HFTokenizer(TableTokenizer):
    """A tokenizer.json, given as its text, and what tokenizer_config.json beside it says."""

    kind = "hf"

    def __init__(self, description: str, config: dict | None = None):
        # A pool of threads in each of several worker processes would only be in its own way.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.description, self.config = description, dict(config or {})
        definition = json.loads(description)
        whole = from_json(definition)
        vocabulary = whole.get_vocab(with_added_tokens=True)
        added = {token["content"]: token for token in definition.get("added_tokens") or []}
        self.marks = {name: marked(name, self.config, set(added) or set(vocabulary)) for name in WELL_KNOWN}
        marks = {name for name in self.marks.values() if name in vocabulary}
        unknown = unknown_token(definition["model"])
        # A run of white space is text in every sense. Anything else that was added has a meaning, even where it is
        # marked as not special, as <think> and <tool_call> are.
        spaces = {name for name, token in added.items() if is_space(name) and not token["special"]}
        control = (set(added) | marks) - spaces - ({unknown} - marks)
        named = {name: vocabulary[name] for name in control | ({unknown} & set(vocabulary))}
        silent = {id for name, id in named.items() if name not in added or added[name]["special"]}

        kept = [added[name] | {"id": vocabulary[name]} for name in sorted(spaces)]
        encoding = encoder_definition(definition, control, kept)
        self.encoder = from_json(encoding)
        table = token_table(whole, definition, vocabulary)
        bos, eos, pad = (vocabulary.get(self.marks[name]) for name in WELL_KNOWN)
        super().__init__(
            [b"" if id in silent else token for id, token in enumerate(table)],
            dict(sorted(named.items(), key=lambda pair: pair[1])),
            bos_id=eos if bos is None else bos,
            eos_id=eos,
            pad_id=eos if pad is None else pad,
            hash="",
        )
        decides = {"tokenizer": definition, "bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}
        self.hash = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        word = next((token.strip() for token in table if token.strip().isalnum()), b"").decode("utf-8", "ignore")
        self.adds_space = b"".join(self.table[id] for id in self.encode(word)).startswith(b" ")
        self.inside = from_json(without_prefix(encoding)) if self.adds_space else self.encoder
        self.adds_space_after_special = self.adds_space and adds_after_special(whole, self, word)

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self.encode_with(self.encoder, listed(texts))

    def encode_inside(self, text: str) -> np.ndarray:
        return self.encode_with(self.inside, [text])[0]

    def encode_with(self, encoder, texts: list[str]) -> list[np.ndarray]:
        try:
            encoded = encoder.encode_batch_fast(texts, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):  # which of them depends on the version of tokenizers
            for number, text in enumerate(texts):
                refuse_surrogates(text, place(texts, number))
            raise
        return [np.array(one.ids, dtype=np.int32) for one in encoded]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        text = super().decode(ids, skip_special)
        return text.removeprefix(" ") if self.adds_space else text

    def files(self, chat_template: str | None = None) -> dict[str, bytes | str]:
        chat = {} if chat_template is None else {"chat_template": chat_template}
        config = json.dumps(self.config | self.marks | chat, indent=2, ensure_ascii=False) + "\n"
        # the description comes last: where it is, all is there
        return {"tokenizer_config.json": config, "tokenizer.json": self.description}

    def arguments(self) -> tuple:
        return (self.description, self.config)


def read_hugging_face(path: Path) -> HFTokenizer:
    """The tokenizer in a tokenizer.json, with what the files beside it say of its special tokens."""
    config = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second has the last word
        if (path.parent / name).exists():
            config |= read_json(path.parent / name)
    template = path.parent / "chat_template.jinja"
    if template.exists():
        config["chat_template"] = template.read_text(encoding="utf-8")
    try:
        return HFTokenizer(path.read_text(encoding="utf-8"), config)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def is_hugging_face(definition: dict) -> bool:
    """Whether the content of a tokenizer.json is Hugging Face's: ours says its kind, theirs has a model."""
    return "kind" not in definition and isinstance(definition.get("model"), dict)


def from_json(definition: dict):
    """A `tokenizers.Tokenizer`. Raises ValueError where the extra is missing or its version cannot read this."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            "a Hugging Face tokenizer.json needs the package tokenizers: pip install 'minillm[hf]'"
        ) from None
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # tokenizers raises no narrower one
        raise ValueError(f"tokenizers {tokenizers.__version__} cannot read it: {error}") from None


# --- special tokens ---------------------------------------------------------------------------------------------------


def marked(name: str, config: dict, vocabulary: set[str]) -> str | None:
    """The token that begins, ends or pads: the one that the config names (it may name none), else a well-known one."""
    if name in config:
        token = config[name]
        return token["content"] if isinstance(token, dict) else token
    return next((token for token in WELL_KNOWN[name] if token in vocabulary), None)


def is_space(token: str) -> bool:
    """Whether a token is white space, perhaps written with the mark that stands for a space."""
    return token.replace(SPACE_MARK, " ").isspace()


def unknown_token(model: dict) -> str | None:
    """The token of what the vocabulary cannot write."""
    if isinstance(model["vocab"], list):  # Unigram: a list of pieces and scores
        return None if model.get("unk_id") is None else model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def encoder_definition(definition: dict, control: set[str], spaces: list[dict]) -> dict:
    """The tokenizer with nothing in it that a text could spell a control token with, and nothing that adds one.

    `spaces` are the added tokens that stay. Taking out the others is not enough: some stand in the model's vocabulary
    too, where a word that is spelled like them would find them.
    """
    model = dict(definition["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = [["" if piece in control else piece, score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {piece: id for piece, id in model["vocab"].items() if piece not in control}
        # an id of their own in the model, so that they keep it whatever else has gone
        model["vocab"] |= {token["content"]: token["id"] for token in spaces}
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if control.isdisjoint(merged(pair))]
        model["dropout"] = None  # the same text always gives the same ids
        if model.get("unk_token") in control:
            model["unk_token"] = None
    nothing = {"post_processor": None, "truncation": None, "padding": None}
    return definition | nothing | {"model": model, "added_tokens": spaces}


def merged(pair: str | list[str]) -> tuple[str, str, str]:
    """Both sides of a merge, and what it makes."""
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return left, right, left + right


def adds_after_special(whole, tokenizer: HFTokenizer, word: str) -> bool:
    """Whether a word after a special token is encoded as at the beginning of a text; depends on the file's version."""
    mark = next((name for name in tokenizer.marks.values() if name in tokenizer.special_tokens), "")
    return whole.encode(mark + word, add_special_tokens=False).ids[bool(mark) :] == tokenizer.encode(word)


def without_prefix(definition: dict) -> dict:
    """The encoder for text in the middle of a document: nothing in it puts a space before a text."""
    parts = {name: starting_with_nothing(definition.get(name)) for name in ("normalizer", "pre_tokenizer")}
    return definition | parts


def starting_with_nothing(part: dict | None) -> dict | None:
    if part is None or part["type"] == "Prepend":
        return None
    changed = dict(part)
    if part["type"] == "Metaspace":
        changed["prepend_scheme"] = "never"
    if "add_prefix_space" in part:
        changed["add_prefix_space"] = False
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            changed[name] = [one for one in map(starting_with_nothing, part[name]) if one is not None]
    return changed


# --- what each id adds to the text ------------------------------------------------------------------------------------


def byte_characters() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte, as GPT-2 chose them.

    A byte that is a visible character of Latin-1 is that character; the others, in order, are those from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


def token_table(whole, definition: dict, vocabulary: dict[str, int]) -> list[bytes]:
    """What each id adds to the text in the middle of one; b"" for an id that no token has."""
    kinds = decoder_kinds(definition.get("decoder"))
    size = max(vocabulary.values(), default=-1) + 1
    if "ByteLevel" in kinds:
        table, characters = [b""] * size, byte_characters()
        for token, id in vocabulary.items():
            known = all(character in characters for character in token)
            table[id] = bytes(characters[character] for character in token) if known else token.encode()
        return table
    table = [text.encode() for text in texts_inside(whole, size)]
    if "ByteFallback" in kinds:
        for token, id in vocabulary.items():
            if match := BYTE_TOKEN.fullmatch(token):
                table[id] = bytes([int(match[1], 16)])
    return table


def decoder_kinds(decoder: dict | None) -> set[str]:
    """The types of a decoder and of those it is made of."""
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*map(decoder_kinds, decoder.get("decoders", [])))


def texts_inside(whole, size: int) -> list[str]:
    """What each id decodes to between two others, whatever its decoder does at the ends of a text."""
    alone = whole.decode_batch([[id] for id in range(size)], skip_special_tokens=False)
    anchor = next((id for id, text in enumerate(alone) if text.isalnum()), 0)
    before = len(alone[anchor])
    after = len(whole.decode([anchor, anchor], skip_special_tokens=False)) - before
    between = whole.decode_batch([[anchor, id, anchor] for id in range(size)], skip_special_tokens=False)
    return [text[before : len(text) - after] for text in between]
