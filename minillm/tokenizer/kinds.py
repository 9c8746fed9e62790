"""What a tokenizer is, and the three kinds of our own: encoding, decoding, files.

Ids start with the special tokens. BPE continues with 256 bytes, for what it has no piece for, then with pieces;
`byte` continues with the 256 bytes, `char` with the characters of its corpus in order of code point.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece

from minillm.files import explained, write_atomically

# The reserved places let a later chat format name its symbols without moving any other id.
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")
SPECIAL_TOKENS += tuple(f"<|reserved_{i}|>" for i in range(16 - len(SPECIAL_TOKENS)))

SPACE_MARK = "\u2581"  # sentencepiece writes a space as this character, so the character itself needs another way
LONG = 4096  # characters; sentencepiece takes about 3 times as long a byte over texts of a megabyte
WORD_START = re.compile("(?<=[^ ]) ")


class Tokenizer(Protocol):
    """What the rest of minillm knows of a tokenizer."""

    kind: str
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    special_tokens: dict[str, int]
    adds_space: bool  # whether encoding begins as if the text began with a space, which decoding takes away again
    adds_space_after_special: bool  # whether it does so after a special token too
    hash: str  # sha256, hex, of everything that decides its ids

    def encode(self, text: str) -> list[int]:
        """Ids of a text: never a special one, none added. Raises ValueError where the text cannot be encoded."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, the same as `encode` gives, faster. An error names the text by its number, from 0."""

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_batch` with an array of int32 a text, which saves making a Python object of every id."""

    def encode_inside(self, text: str) -> np.ndarray:
        """Ids of a text that goes on in the middle of a document: without the space that `adds_space` tells of."""

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text; bytes that are no UTF-8, as where ids end inside a character, become U+FFFD."""

    def token_bytes(self, id: int) -> bytes:
        """What one id adds to the text: UTF-8, perhaps a part of a character; b"" for a special id.

        To print ids as they come, feed these to `codecs.getincrementaldecoder("utf-8")("replace")`.
        """

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json, and for BPE tokenizer.model, into a directory."""


class TableTokenizer(ABC):
    """What the kinds share: a table of the bytes of every id, from which decoding follows."""

    kind: str
    adds_space = adds_space_after_special = False

    def __init__(
        self, table: list[bytes], special_tokens: dict[str, int], *, bos_id: int, eos_id: int, pad_id: int, hash: str
    ):
        self.table = table
        self.vocab_size = len(table)
        self.special_tokens = special_tokens
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
        self.hash = hash

    @abstractmethod
    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """What makes a kind: see `Tokenizer`."""

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_inside(self, text: str) -> np.ndarray:
        return self.encode_arrays([text])[0]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        ids = [int(id) for id in ids]
        if wrong := [id for id in ids if not 0 <= id < self.vocab_size]:
            raise ValueError(f"token id {wrong[0]} is outside the vocabulary, 0 to {self.vocab_size - 1}")
        names = {} if skip_special else {id: name.encode() for name, id in self.special_tokens.items()}
        return b"".join([names.get(id, self.table[id]) for id in ids]).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        return self.table[id]

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        with explained(directory):
            directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            write_atomically(directory / name, content)

    @abstractmethod
    def files(self) -> dict[str, bytes | str]:
        """Name and content of each file of a saved tokenizer, in the order of writing."""

    @abstractmethod
    def arguments(self) -> tuple:
        """What its class makes the same one of."""

    def __reduce__(self):
        return type(self), self.arguments()


class OwnTokenizer(TableTokenizer):
    """What our own kinds share: the names of the special tokens, and a definition that is hashed and saved."""

    def __init__(self, table: list[bytes], special_tokens: dict[str, int], definition: dict):
        self.definition = {"kind": self.kind, "vocab_size": len(table), "special_tokens": list(special_tokens)}
        self.definition |= definition
        bos_id, eos_id, pad_id = (special_tokens[name] for name in ("<s>", "</s>", "<pad>"))
        hash = definition_hash(self.definition)
        super().__init__(table, special_tokens, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id, hash=hash)

    def files(self) -> dict[str, bytes | str]:
        return {"tokenizer.json": json.dumps(self.definition | {"hash": self.hash}, indent=1) + "\n"}


class BPETokenizer(OwnTokenizer):
    """Byte-pair encoding by a sentencepiece model, given as the bytes of its file."""

    kind = "bpe"

    def __init__(self, model: bytes):
        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        ids = range(self.processor.get_piece_size())
        special = {
            self.processor.id_to_piece(i): i
            for i in ids
            if self.processor.is_control(i) or self.processor.is_unknown(i)
        }
        table = [b"" if i in special.values() else self.piece_bytes(i) for i in ids]
        super().__init__(table, special, {"model_sha256": hashlib.sha256(model).hexdigest()})
        mark_ids = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self.mark_ids = np.array(mark_ids, dtype=np.int32)

    def piece_bytes(self, id: int) -> bytes:
        piece = self.processor.id_to_piece(id)
        if self.processor.is_byte(id):  # its piece is written <0xE2>
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE_MARK, " ").encode()

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        texts = listed(texts)
        cut = [independent_parts(text) for text in texts]
        try:
            encoded = self.encode_parts(list(chain.from_iterable(cut)))
        except (RuntimeError, TypeError, UnicodeEncodeError):  # which of them depends on sentencepiece's version
            for number, text in enumerate(texts):
                refuse_surrogates(text, place(texts, number))
            raise
        if len(encoded) == len(texts):  # nothing was cut
            return encoded
        rest = iter(encoded)
        return [self.joined(parts, rest) for parts in cut]

    def encode_parts(self, parts: list[str]) -> list[np.ndarray]:
        # one thread: sentencepiece's default is one a core, in each of several processes
        if hasattr(self.processor, "encode_as_numpy"):  # newer than 0.2.1
            return self.processor.encode_as_numpy(parts, num_threads=1)
        return [np.array(ids, dtype=np.int32) for ids in self.processor.encode(parts, num_threads=1)]

    def joined(self, parts: list[str], encoded: Iterator[np.ndarray]) -> np.ndarray:
        """The ids of a text, taking those of its parts from `encoded`; U+2581 is written as its three bytes."""
        pairs = zip(parts, encoded)  # in this order: no more is taken than there are parts
        return np.concatenate(
            [np.tile(self.mark_ids, len(part)) if part.startswith(SPACE_MARK) else ids for part, ids in pairs]
        )

    def files(self) -> dict[str, bytes | str]:
        # the description comes last because it names the hash of the model
        return {"tokenizer.model": self.model, **super().files()}

    def arguments(self) -> tuple:
        return (self.model,)


def independent_parts(text: str) -> list[str]:
    """Parts of a text whose ids, in a row, are the ids of the text; runs of U+2581 are parts of their own.

    No piece has a space after another character, so merges never reach over the start of a space; long texts are cut
    there.
    """
    if len(text) <= LONG and SPACE_MARK not in text:
        return [text]
    parts = []
    for stretch in re.split(f"({SPACE_MARK}+)", text):
        start = 0
        while len(stretch) - start > LONG and (cut := WORD_START.search(stretch, start + LONG)):
            parts.append(stretch[start : cut.start()])
            start = cut.start()
        parts.append(stretch[start:])
    return parts


class CharTokenizer(OwnTokenizer):
    """One id a character, for the characters of one corpus."""

    kind = "char"

    def __init__(self, characters: Iterable[str], special_tokens: Sequence[str] = SPECIAL_TOKENS):
        characters = "".join(sorted(set(characters)))
        special = {name: id for id, name in enumerate(special_tokens)}
        super().__init__([b""] * len(special) + [c.encode() for c in characters], special, {"characters": characters})
        points = [ord(c) for c in characters]
        self.ids = np.full(max(points, default=0) + 2, -1, dtype=np.int32)  # by code point; the last is for all above
        self.ids[points] = range(len(special), self.vocab_size)

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        texts = listed(texts)
        batch = []
        for number, text in enumerate(texts):
            refuse_surrogates(text, place(texts, number))
            points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
            ids = self.ids[np.minimum(points, len(self.ids) - 1)]
            if ids.size and ids.min() < 0:
                at = int(ids.argmin())
                raise ValueError(
                    f"{place(texts, number)}character {at} is {text[at]!r} (U+{ord(text[at]):04X}), not one of the "
                    f"{len(self.definition['characters'])} characters this tokenizer was trained on; train it on text "
                    "that has it, or use kind bpe or byte"
                )
            batch.append(ids)
        return batch

    def arguments(self) -> tuple:
        return (self.definition["characters"], self.definition["special_tokens"])


class ByteTokenizer(OwnTokenizer):
    """One id a byte of UTF-8. Needs no training."""

    kind = "byte"

    def __init__(self, special_tokens: Sequence[str] = SPECIAL_TOKENS):
        special = {name: id for id, name in enumerate(special_tokens)}
        super().__init__([b""] * len(special) + [bytes([byte]) for byte in range(256)], special, {})
        self.first = len(special)

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        texts = listed(texts)
        for number, text in enumerate(texts):
            refuse_surrogates(text, place(texts, number))
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) + self.first for text in texts]

    def arguments(self) -> tuple:
        return (list(self.special_tokens),)


def listed(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError("a list of texts is expected; for one text there is encode")
    return list(texts)


def place(texts: Sequence[str], number: int) -> str:
    return "" if len(texts) == 1 else f"text {number}: "


def refuse_surrogates(text: str, where: str = "") -> None:
    """Raise ValueError for a text that has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}character {error.start} is U+{ord(text[error.start]):04X}, half of a surrogate pair, which UTF-8 "
            "cannot hold; remove it or mend its source"
        ) from None


def definition_hash(definition: dict) -> str:
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()
