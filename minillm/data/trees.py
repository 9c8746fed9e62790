"""Preferences as stored documents: trees of a prompt and its answers, and what is left out of long ones.

    [ the prompt without its last token | that token, the chosen answer | that token, the rejected answer ]

rows.py says why. A tree is as long as all of this, and where that is more than a row holds, it is cut:

1. the prompt from its beginning, as far as needed but to no less than a third of the row: whole turns are left out,
   and where the last is too long by itself, its text loses its beginning. What the system says stays, if it fits.
2. the answers at their end, both to the same limit, so that neither is told from the other by where it was cut.

So what is left of a prompt is rendered as any prompt is, and the end of it always stays. A pair is dropped where its
answers are equal, from the beginning or because what told them apart was cut off, and where nothing is left of one.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from operator import itemgetter
from typing import Annotated, Literal, NamedTuple

import numpy as np

from minillm.data.chat import TemplateName, prompt, render_all, stop_ids
from minillm.data.chat_templates import ChatTemplate, Message
from minillm.data.conversations import says_nothing
from minillm.data.masked import Masked
from minillm.data.preferences import PreferencePair
from minillm.data.store import TokenStore
from minillm.tokenizer import Tokenizer

PROMPT_SHARE = 3  # a prompt is cut to no less than one part in so many of a row: itself and two answers
CHOSEN, REJECTED, MISMATCHED = 1, 2, 3  # branches; 0 is the prompt
AFTER_CUT = {None: None, "empty": "emptied", "equal": "alike"}  # what is said of trees that became so


@dataclass(frozen=True)
class PairsConfig:
    """How preferences are given to the model."""

    template: TemplateName = "auto"
    long: Annotated[
        Literal["cut", "drop"],
        "a prompt with its answers longer than data.seq_len: cut the prompt's beginning, then both answers; or drop",
    ] = "cut"
    on_bad: Annotated[Literal["error", "skip"], "a row that is no preference: end with its place, or leave it out"] = (
        "error"
    )


class Answer(NamedTuple):
    """A branch of a tree, without the prompt's last token before it."""

    branch: int
    tokens: np.ndarray
    learned: np.ndarray  # bool

    def cut(self, limit: int) -> "Answer":
        """At most so many tokens of it, up to the last of them that is learned."""
        learned = np.flatnonzero(self.learned[:limit])
        end = int(learned[-1]) + 1 if len(learned) else 0
        return Answer(self.branch, self.tokens[:end], self.learned[:end])


class Tree(NamedTuple):
    """A prompt and its answers."""

    prompt: np.ndarray
    answers: list[Answer]

    @property
    def length(self) -> int:
        return len(self.prompt) - 1 + sum(1 + len(answer.tokens) for answer in self.answers)

    def tokens(self) -> np.ndarray:
        """As it is stored."""
        branches = [part for answer in self.answers for part in (self.prompt[-1:], answer.tokens)]
        return np.concatenate([self.prompt[:-1], *branches])

    def marks(self) -> np.ndarray:
        """Of each token twice its branch, and 1 more where it is learned; uint8."""
        branches = [2 * answer.branch + np.append(False, answer.learned) for answer in self.answers]
        return np.concatenate([np.zeros(len(self.prompt) - 1), *branches]).astype(np.uint8)


def read_tree(store: TokenStore, document: int) -> Tree:
    """A stored document."""
    start, stop = store.document_offsets[document : document + 2].tolist()
    tokens, branches, learned = (read(start, stop) for read in (store.tokens, store.branches, store.trained))
    begins = np.flatnonzero(np.diff(branches, prepend=0)).tolist()
    answers = [
        Answer(int(branches[begin]), tokens[begin + 1 : end], learned[begin + 1 : end] == 1)
        for begin, end in pairwise([*begins, stop - start])
    ]
    return Tree(tokens[: begins[0] + 1], answers)


# --- from preferences to trees ----------------------------------------------------------------------------------------


def encode_preferences(
    template: ChatTemplate, long: str, tokenizer: Tokenizer, seq_len: int, preferences: Sequence[PreferencePair]
) -> Masked:
    """The trees of some preferences, in order, those left out that cannot be learned from."""
    ends = set(stop_ids(template, tokenizer)) | {tokenizer.eos_id}
    limit = seq_len + 1  # a row reads one token more than it has places
    counts: Counter[str] = Counter()
    numbers, tokens, marks = [], [], []
    for number, (preference, whole) in enumerate(zip(preferences, trees(template, tokenizer, preferences))):
        kept, why = whole, "empty" if has_empty_answer(preference) else problem(whole)
        if why is None and whole.length > limit:
            kept = shortened(template, tokenizer, preference.prompt, whole, limit) if long == "cut" else None
            why = "dropped" if kept is None else AFTER_CUT[problem(kept)]
        counts.update({"tokens": whole.length})
        if why is not None:
            counts.update({why: 1, "truncated": whole.length if why == "dropped" else 0})
            continue
        numbers.append(number)
        tokens.append(kept.tokens())
        marks.append(kept.marks())
        counts.update(counted(whole, kept, ends))
    return Masked(
        np.concatenate([np.empty(0, np.int64), *tokens]),
        np.concatenate([np.empty(0, np.uint8), *marks]),
        np.array(list(map(len, tokens)), dtype=np.int64),
        np.array(numbers, dtype=np.int64),
        dict(counts),
    )


def trees(template: ChatTemplate, tokenizer: Tokenizer, preferences: Sequence[PreferencePair]) -> Iterator[Tree]:
    """The tree of each preference, however long it is."""
    # (branch, messages) of each: a PreferencePair has them behind its prompt in the order of branches
    answers = [list(filter(itemgetter(1), enumerate(one[1:], CHOSEN))) for one in preferences]
    conversations = [[*one.prompt, *said] for one, given in zip(preferences, answers) for _, said in given]
    rendered = iter(render_all(template, tokenizer, conversations))
    for preference, given in zip(preferences, answers):
        before = sum(message.role == "assistant" for message in preference.prompt)  # answers of the prompt
        branches = []
        for branch, _ in given:
            whole = next(rendered)
            (start, _), (_, stop) = whole.answers[before], whole.answers[-1]
            asked = whole.tokens[:start]  # the same before each
            branches.append(Answer(branch, whole.tokens[start:stop], whole.trained()[start:stop]))
        yield Tree(asked, branches)


def has_empty_answer(preference: PreferencePair) -> bool:
    """Whether one of the answers that are compared says nothing."""
    given = filter(None, (preference.chosen, preference.rejected))
    return any(all(says_nothing(one) for one in said if one.role == "assistant") for said in given)


def problem(tree: Tree) -> str | None:
    """Why nothing can be learned from a tree, if so."""
    if not all(answer.learned.any() for answer in tree.answers):
        return "empty"
    chosen, rejected = tree.answers[0], tree.answers[-1]
    paired = (chosen.branch, rejected.branch) == (CHOSEN, REJECTED)
    return "equal" if paired and np.array_equal(chosen.tokens, rejected.tokens) else None


def counted(whole: Tree, kept: Tree, ends: set[int]) -> dict[str, int]:
    """What is counted of a tree that is stored."""
    given = [answer for answer in kept.answers if answer.branch != MISMATCHED]
    lengths = {answer.branch: int(answer.learned.sum()) for answer in given}
    chosen, rejected = lengths.get(CHOSEN, 0), lengths.get(REJECTED, 0)
    return {
        "stored": kept.length,
        "trained": sum(lengths.values()),
        "answers": len(given),
        "truncated": whole.length - kept.length,
        "cut_prompts": int(len(kept.prompt) < len(whole.prompt)),
        "cut_answers": int(any(len(a.tokens) < len(b.tokens) for a, b in zip(kept.answers, whole.answers))),
        "mismatched": int(len(given) < len(kept.answers)),
        "pairs": int(len(given) == 2),
        "chosen": int(CHOSEN in lengths),
        "rejected": int(REJECTED in lengths),
        "chosen_tokens": chosen,
        "rejected_tokens": rejected,
        "chosen_longer": int(len(given) == 2 and chosen > rejected),
        "rejected_longer": int(len(given) == 2 and rejected > chosen),
        "ended": sum(int(answer.tokens[-1]) in ends for answer in given),
    }


# --- long ones --------------------------------------------------------------------------------------------------------


def shortened(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], whole: Tree, limit: int
) -> Tree | None:
    """A tree of at most `limit` tokens, as this file's text says; None where its prompt cannot be made so short."""
    room = limit - (len(whole.answers) - 1)  # for the prompt and all answers: each after the first repeats a token
    answers = [len(answer.tokens) for answer in whole.answers]
    asked, most = whole.prompt, max(room - sum(answers), room // PROMPT_SHARE)
    if len(asked) > most:
        asked = shorter_prompt(template, tokenizer, messages, most)
    if asked is None:
        return None
    limit = common_limit(answers, room - len(asked))
    return Tree(asked, [answer.cut(limit) for answer in whole.answers])


def shorter_prompt(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], most: int
) -> np.ndarray | None:
    """The end of a prompt in at most so many tokens, whole turns of it where possible; None where it is not."""
    begins = next(number for number, message in enumerate(messages) if message.role == "user")
    system, turns = messages[:begins], messages[begins:]
    starts = [number for number, message in enumerate(turns) if message.role == "user"]

    def since(turn: int) -> list[Message]:
        return [*system, *turns[starts[turn] :]]

    def last_since(character: int, before: Sequence[Message]) -> list[Message]:
        first, *rest = turns[starts[-1] :]
        return [*before, first._replace(content=first.content[character:]), *rest]

    def fits(messages_since: Callable[[int], list[Message]], place: int) -> bool:
        return len(prompt(template, tokenizer, messages_since(place))) <= most

    ways = [(len(starts), since)]
    ways += [(len(turns[starts[-1]].content), partial(last_since, before=before)) for before in (system, [])]
    for places, messages_since in ways:
        place = bisect_left(range(places), True, key=partial(fits, messages_since))
        if place < places:
            return np.array(prompt(template, tokenizer, messages_since(place)))
    return None


def common_limit(lengths: Sequence[int], room: int) -> int:
    """The most that each of these may keep so that all together fit."""
    for number, length in enumerate(sorted(lengths)):
        share = room // (len(lengths) - number)
        if length > share:
            return share
        room -= length
    return max(lengths)
