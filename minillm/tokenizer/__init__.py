"""Text to token ids and back: byte-pair encoding by sentencepiece, single characters, or bytes.

The three kinds keep the same promises. Any text they encode comes back exactly. Text is never control: no text, not
even one that spells "</s>", encodes to a special id; special ids come from whoever builds the sequence. And a
tokenizer has a hash, which data and checkpoints carry so that they can refuse another one.

`kinds.py` encodes, decodes, saves and loads; `train.py` makes a tokenizer from a corpus.
"""

from minillm.tokenizer.hf import HFTokenizer
from minillm.tokenizer.kinds import (
    SPECIAL_TOKENS,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
)
from minillm.tokenizer.load import describe, load_tokenizer
from minillm.tokenizer.train import TokenizerConfig, choose_vocab_size, train_tokenizer

__all__ = [
    "SPECIAL_TOKENS",
    "BPETokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "HFTokenizer",
    "Tokenizer",
    "TokenizerConfig",
    "choose_vocab_size",
    "describe",
    "load_tokenizer",
    "train_tokenizer",
]
