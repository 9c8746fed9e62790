"""Making a tokenizer from a corpus: which text BPE is trained on, which characters, how many ids."""

import io
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import sentencepiece

from minillm.tokenizer.kinds import (
    SPACE_MARK,
    SPECIAL_TOKENS,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    refuse_surrogates,
)
from minillm.tokenizer.load import load_tokenizer

logger = logging.getLogger("minillm")

OWN_IDS = len(SPECIAL_TOKENS) + 256  # of every BPE vocabulary: special tokens and bytes
SMALLEST_BPE = 300
DROPS_ITEM = "\u2585"  # sentencepiece's own mark for unknown: its trainer skips an item that holds one
CHUNK = 4096  # characters of one training item: far below the 65,535 a BPE "word" may have, and long enough to be rare
COVERAGE = 0.9995  # share of all characters that get a piece of their own, sentencepiece's default; the rest are bytes


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens."""

    kind: Annotated[
        Literal["bpe", "char", "byte", "hf"], "BPE trained on the corpus, its characters, bytes, or Hugging Face's"
    ] = "bpe"
    path: Annotated[str | None, "folder of a trained tokenizer, or tokenizer.json, to use instead (its kind wins)"] = (
        None
    )
    vocab_size: Annotated[
        int | None, "BPE: ids, special tokens and bytes included; none: chosen for the corpus", f">= {SMALLEST_BPE}"
    ] = None
    train_bytes: Annotated[
        int, "BPE: largest sample of the corpus to train on; memory is up to 25 times that", ">= 100_000"
    ] = 20_000_000

    def __post_init__(self):
        if self.kind == "hf" and self.path is None:
            raise ValueError("path: kind hf needs the folder of a Hugging Face tokenizer, or its tokenizer.json")
        if self.vocab_size is not None and self.kind != "bpe":
            raise ValueError(f"vocab_size: {self.vocab_size} was given, but kind {self.kind} has a size of its own")
        if self.vocab_size is not None and self.vocab_size < SMALLEST_BPE:
            raise ValueError(
                f"vocab_size: {self.vocab_size} is too small; special tokens and bytes take {OWN_IDS}, so give at "
                f"least {SMALLEST_BPE}"
            )


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Make the tokenizer that a config asks for, reading the documents once.

    The same documents give the same tokenizer, byte for byte. With `config.path` set it is loaded and `texts` is not
    read. Raises ValueError for a corpus without text.
    """
    if config.path is not None:
        tokenizer = load_tokenizer(config.path)
        if config.kind == "hf" and tokenizer.kind != "hf":
            raise ValueError(f"kind: hf was given, but the tokenizer in {config.path} is of kind {tokenizer.kind}")
        if config.vocab_size is not None and config.vocab_size > tokenizer.vocab_size:
            logger.info("tokenizer: %s has %d ids, fewer than vocab_size", config.path, tokenizer.vocab_size)
        elif config.vocab_size not in (None, tokenizer.vocab_size):
            raise ValueError(
                f"vocab_size: {config.vocab_size} was given, but the tokenizer in {config.path} has "
                f"{tokenizer.vocab_size} ids; leave vocab_size out"
            )
        return tokenizer
    if config.kind == "byte":
        return ByteTokenizer()
    if config.kind == "char":
        return CharTokenizer(corpus_characters(texts))
    return train_bpe(texts, config)


def corpus_characters(texts: Iterable[str]) -> set[str]:
    characters = set()
    for number, text in enumerate(texts):
        new = set(text) - characters
        if any("\ud800" <= c <= "\udfff" for c in new):
            refuse_surrogates(text, f"document {number}: ")
        characters |= new
    if not characters:
        raise ValueError("the corpus is empty: there is no character to make a tokenizer of")
    return characters


def train_bpe(texts: Iterable[str], config: TokenizerConfig) -> BPETokenizer:
    """Train a sentencepiece model on documents, or on a sample of them where there are more than `train_bytes`."""
    items, sampled, total = sample_items(texts, config.train_bytes)
    if sampled < total:
        megabytes = f"{sampled / 1e6:.1f} MB spread over the {total / 1e6:.1f} MB of the corpus"
        logger.info("tokenizer: training on a sample, %s", megabytes)
    counts = Counter()
    for item in items:
        counts.update(item)
    characters = frequent_characters(counts)
    vocab_size = config.vocab_size or choose_vocab_size(total, len(characters))
    characters = characters[: (vocab_size - OWN_IDS) // 2]  # the other half is for merges
    if all(c.isspace() for c in characters):
        raise ValueError("the corpus is empty: there is no text to train a tokenizer on")
    # Any other character ends an item. sentencepiece would drop the whole item for some of them, and would refuse a
    # vocabulary without room for them all; encoding spells them in bytes.
    learnable = re.compile(f"[{re.escape(''.join(characters))}]+")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(fragment for item in items for fragment in learnable.findall(item)),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        max_sentence_length=4 * CHUNK,  # in bytes; longer items are dropped without a word
        shuffle_input_sentence=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        control_symbols=list(SPECIAL_TOKENS[4:]),
        num_threads=1,  # written into the model, so it must not depend on the machine
        minloglevel=2,
    )
    tokenizer = BPETokenizer(model.getvalue())
    if tokenizer.vocab_size < vocab_size:
        level = logging.INFO if config.vocab_size is None else logging.WARNING
        lowered = "tokenizer: vocab_size lowered from %d to %d, all the pieces this corpus has"
        logger.log(level, lowered, vocab_size, tokenizer.vocab_size)
    return tokenizer


def frequent_characters(counts: Counter) -> list[str]:
    """The most frequent characters, as many as make up COVERAGE of all, without those sentencepiece cannot learn."""
    wanted = COVERAGE * counts.total()
    characters, seen = [], 0
    for c, n in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        if seen >= wanted:
            break
        characters.append(c)
        seen += n
    return [c for c in characters if c not in ("\0", SPACE_MARK, DROPS_ITEM)]


def sample_items(texts: Iterable[str], max_bytes: int) -> tuple[list[str], int, int]:
    """(training items, their bytes, bytes of all texts), holding no more than `max_bytes` of text at any time.

    Item k is kept where its key, k times the golden ratio modulo 1, is below a limit; the limit falls as the items
    kept outgrow `max_bytes`. The keys of any stretch of the corpus are spread evenly, so the sample is too.
    """
    golden, whole = 0x9E3779B97F4A7C15, 2**64
    kept, size, total, limit, index = [], 0, 0, whole, 0
    for number, text in enumerate(texts):
        for item in split_text(text):
            try:
                n_bytes = len(item.encode())
            except UnicodeEncodeError:
                refuse_surrogates(text, f"document {number}: ")
            total += n_bytes
            index += 1
            key = index * golden % whole
            if key < limit:
                kept.append((key, n_bytes, item))
                size += n_bytes
            while size > max_bytes:
                limit = limit * 9 // 10
                kept = [entry for entry in kept if entry[0] < limit]
                size = sum(n_bytes for _, n_bytes, _ in kept)
    return [item for _, _, item in kept], size, total


def split_text(text: str) -> Iterator[str]:
    """Parts of at most CHUNK characters, cut before a newline or a space where there is one.

    Before and not after it: sentencepiece strips newlines from the end of an item, and a space belongs to the word
    that follows it.
    """
    start = 0
    while len(text) - start > CHUNK:
        middle, end = start + CHUNK // 2, start + CHUNK
        cut = text.rfind("\n", middle, end)
        if cut < 0:
            cut = text.rfind(" ", middle, end)
        if cut < 0:
            cut = end
        yield text[start:cut]
        start = cut
    yield text[start:]


def choose_vocab_size(n_bytes: int, n_characters: int) -> int:
    """A BPE vocabulary for a corpus of `n_bytes` in which `n_characters` different characters make up COVERAGE.

    The square root follows Heaps' law, the growth of distinct words with a text. The factor 2 is a judgement; measured
    against smaller vocabularies in docs/tokenizer.md.
    """
    merges = min(2 * n_bytes**0.5, 32_000)
    size = OWN_IDS + n_characters + merges
    return min(-(-int(size) // 64) * 64, 65_536)
