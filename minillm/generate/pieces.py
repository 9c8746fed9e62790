"""From tokens to text, as far as it is certain: a character when its last byte has come, and no part of a stop string.

token -> bytes -> characters -> what cannot become a stop string any more
"""

import codecs
from collections.abc import Sequence

from minillm.generate.params import SamplingParams
from minillm.tokenizer import Tokenizer


class TextPieces:
    """The text of one completion, a piece a token.

    The pieces together are the text before the first of `params.stop`: the one that ends first, and of several that
    end together the longest; so they do not depend on how the text is cut into tokens. The text of the first
    `min_new_tokens` is not searched. Without a tokenizer all pieces are empty.
    """

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams):
        self.tokenizer, self.params = tokenizer, params
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        shown = {} if tokenizer is None or params.skip_special_tokens else tokenizer.special_tokens
        self.names = {id: name.encode() for name, id in shown.items()}
        self.tokens = 0
        self.held = ""  # may be the beginning of a stop string
        self.stopped = False  # a stop string has come; no token should follow

    def add(self, token: int) -> str:
        """The text that is certain now, and was not before. A token that only ends a completion is not added."""
        if self.tokenizer is None:
            return ""
        self.tokens += 1
        text = self.decoder.decode(self.names.get(token, self.tokenizer.token_bytes(token)))
        return text if self.tokens <= self.params.min_new_tokens else self.released(text)

    def end(self) -> str:
        """What was held back, when no more tokens come; a part of a character is U+FFFD."""
        text = self.released(self.decoder.decode(b"", final=True))
        rest, self.held = self.held, ""
        return text + rest

    def released(self, text: str) -> str:
        """What of the text so far can be shown."""
        if self.stopped:
            return ""
        text = self.held + text
        stop = first_stop(text, self.params.stop)
        self.stopped = stop is not None
        self.held = "" if self.stopped else beginning_of_stop(text, self.params.stop)
        return text[:stop] if self.stopped else text.removesuffix(self.held)


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop string that ends first begins."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def beginning_of_stop(text: str, stops: Sequence[str]) -> str:
    """The longest end of the text that a stop string begins with."""
    longest = max(map(len, stops), default=0) - 1
    ends = (text[at:] for at in range(max(0, len(text) - longest), len(text)))
    return next((end for end in ends if any(stop.startswith(end) for stop in stops)), "")
