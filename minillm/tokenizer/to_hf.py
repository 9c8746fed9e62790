"""Our own kinds as Hugging Face's files, so that `tokenizers`, transformers and what stands on them give the same ids.

All three become byte-pair encoding in their terms: `char` is one without merges, `byte` one without pieces. Spaces stay
spaces in the pieces (sentencepiece writes them as U+2581), so nothing is changed before the merges and nothing after
them, and a real U+2581 is spelled in its three bytes there as here. With them, begin-of-text stands before every text
unless `add_special_tokens=False` is said, as our models expect.

The merges. sentencepiece knows pieces in an order and joins whatever two neighbours make the best one; a tokenizer.json
lists the pairs that may be joined, in an order. One pair a piece is enough: until a text's piece is whole, what happens
inside it does not depend on what is around it, so it is always made of the same two, and those are found by encoding
the piece itself.

What differs by design: a text that spells a special token becomes it there, never here; a character that `char` has
not seen is an error here and `<unk>` there; and bytes that are no UTF-8, which no text encodes to, are decoded to
another number of U+FFFD.
"""

import json
from collections.abc import Sequence
from itertools import pairwise

from minillm.tokenizer.hf import HFTokenizer
from minillm.tokenizer.kinds import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer


def hugging_face_files(
    tokenizer: Tokenizer, max_seq_len: int | None = None, chat_template: str | None = None
) -> dict[str, bytes | str]:
    """Name and content of the files that transformers reads a tokenizer from; one of Hugging Face's stays as it came.

    `max_seq_len`: the longest text that the model takes, which transformers warns about. `chat_template`: what it was
    taught, in Jinja.
    """
    match tokenizer:
        case HFTokenizer():
            return tokenizer.files(chat_template)
        case BPETokenizer():
            # llama.cpp and other tools of the Llama family read sentencepiece's own file
            extra = {"tokenizer.model": tokenizer.model}
        case CharTokenizer() | ByteTokenizer():
            extra = {}
        case _:
            raise ValueError(f"a tokenizer of kind {tokenizer.kind!r} has no form in Hugging Face's files")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
    }
    if max_seq_len is not None:
        config["model_max_length"] = max_seq_len
    if chat_template is not None:
        config["chat_template"] = chat_template
    files = {"tokenizer_config.json": config, "tokenizer.json": definition_of(tokenizer)}
    return extra | {name: json.dumps(value, indent=1, ensure_ascii=False) + "\n" for name, value in files.items()}


def definition_of(tokenizer: BPETokenizer | CharTokenizer | ByteTokenizer) -> dict:
    """The content of tokenizer.json."""
    merges = merges_of(pieces_by_rank(tokenizer)) if tokenizer.kind == "bpe" else []
    begin = {"id": "<s>", "ids": [tokenizer.bos_id], "tokens": ["<s>"]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": name, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for name, id in tokenizer.special_tokens.items()
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [special_part("<s>", 0), text_part("A", 0)],
            "pair": [special_part("<s>", 0), text_part("A", 0), special_part("<s>", 1), text_part("B", 1)],
            "special_tokens": {"<s>": begin},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": tokenizer.kind != "char",
            "ignore_merges": False,
            "vocab": {name: id for id, name in enumerate(token_names(tokenizer))},
            "merges": merges,
        },
    }


def special_part(name: str, type_id: int) -> dict:
    return {"SpecialToken": {"id": name, "type_id": type_id}}


def text_part(name: str, type_id: int) -> dict:
    return {"Sequence": {"id": name, "type_id": type_id}}


def token_names(tokenizer: BPETokenizer | CharTokenizer | ByteTokenizer) -> list[str]:
    """The name of each id: of a special token its own, of a byte <0xE2>, of anything else the text it stands for."""
    first = len(tokenizer.special_tokens)
    bytes_end = first if tokenizer.kind == "char" else first + 256
    names = [f"<0x{token[0]:02X}>" for token in tokenizer.table[first:bytes_end]]
    return [*tokenizer.special_tokens, *names, *(token.decode() for token in tokenizer.table[bytes_end:])]


def pieces_by_rank(tokenizer: BPETokenizer) -> list[str]:
    """The pieces of a BPE tokenizer, those that are joined first in front."""
    processor = tokenizer.processor
    ids = range(len(tokenizer.special_tokens) + 256, tokenizer.vocab_size)
    return [tokenizer.table[id].decode() for id in sorted(ids, key=lambda id: -processor.get_score(id))]


def merges_of(pieces: Sequence[str]) -> list[list[str]]:
    """The two that each piece is made of, in the order of the pieces; nothing for one that is never made."""
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    return [pair for pair in (last_merge(piece, ranks) for piece in pieces) if pair is not None]


def last_merge(piece: str, ranks: dict[str, int]) -> list[str] | None:
    """What is joined last when a piece is encoded; None for a character, and where it does not come out whole."""
    parts = list(piece)
    while len(parts) > 2:
        joined = [left + right for left, right in pairwise(parts)]
        best = min(joined, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            return None
        at = joined.index(best)  # of equals the first
        parts[at : at + 2] = [best]
    return parts if len(parts) == 2 else None
