"""Text to token ids and back: byte-pair encoding by sentencepiece, single characters, bytes, or Hugging Face's files.

The kinds keep the same promises. Any text that our own kinds encode comes back exactly; one of Hugging Face's gives
back what it keeps. Text is never control: no text, not even one that spells "</s>", encodes to a special id; special
ids come from whoever builds the sequence. And a tokenizer has a hash, which data and checkpoints carry so that they can
refuse another one.

`kinds.py` and `hf.py` encode and decode, `load.py` reads a saved one, `train.py` makes one from a corpus, `eval.py`
measures one, `to_hf.py` writes one as Hugging Face's files.
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
from minillm.tokenizer.to_hf import hugging_face_files
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
    "hugging_face_files",
    "load_tokenizer",
    "train_tokenizer",
]
