"""What a model answers to what was held out, and how near that is to what it should have answered.

exact_match: the share of answers that are the expected text, white space around it aside. BLEU compares n-grams of the
whole set (Papineni et al. 2002, by sacrebleu), ROUGE-L the longest common subsequence of each answer (Lin 2004, by
rouge-chinese); Chinese is cut into words by jieba, or, for BLEU, into characters.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from torch import nn

from minillm.data.store import TokenStore
from minillm.data.trees import CHOSEN
from minillm.generate.generate import generate
from minillm.generate.params import SamplingParams
from minillm.tokenizer import Tokenizer

MODULES = {"bleu": ("sacrebleu",), "rouge_l": ("rouge_chinese", "jieba")}  # of the extra `eval`
CHINESE = re.compile(r"[\u4e00-\u9fff]")


class Asked(NamedTuple):
    """A conversation up to its last answer."""

    prompt: list[int]
    expected: str
    group: str  # the name of its file, without suffix


class Answered(NamedTuple):
    """What was asked, as text, what should have been answered, and what was."""

    group: str
    prompt: str
    expected: str
    answer: str


def last_answers(store: TokenStore, count: int, tokenizer: Tokenizer) -> list[Asked]:
    """So many conversations of a store, evenly spaced, each cut before the last stretch that is learned of it.

    Of preferences it is the chosen answer, which stands next to the prompt; those without one are passed over.
    """
    documents = with_chosen_answer(store)
    count = min(count, len(documents))
    found = []
    for number in (documents[i * len(documents) // count] for i in range(count)):
        begin, end = store.document_offsets[number : number + 2].tolist()
        learned, branches = store.trained(begin, end), store.branches(begin, end)
        places = np.flatnonzero(learned if branches is None else learned & (branches == CHOSEN))
        if not len(places):
            continue
        stop = int(places[-1]) + 1
        start = stop - 1
        while learned[start - 1]:  # what comes first is never learned
            start -= 1
        tokens = store.tokens(begin, end).tolist()
        group = Path(store.source(number).rpartition(":")[0]).name.partition(".")[0]
        found.append(Asked(tokens[:start], tokenizer.decode(tokens[start:stop]), group))
    return found


def with_chosen_answer(store: TokenStore) -> Sequence[int]:
    """The documents with an answer that may be asked for: of preferences, which are trees, those with a chosen one."""
    branches = store.branches(0, store.n_tokens)
    if branches is None:
        return range(store.n_documents)
    return np.unique(np.searchsorted(store.document_offsets, np.flatnonzero(branches == CHOSEN), side="right") - 1)


def answers_of(
    model: nn.Module, tokenizer: Tokenizer, asked: Sequence[Asked], stop_ids: Sequence[int], new_tokens: int
) -> list[Answered]:
    """What a model answers, greedily, many at a time; prompts that leave it no room are answered by nothing."""
    room = [model.config.max_seq_len - len(one.prompt) for one in asked]
    fitting = [i for i, left in enumerate(room) if left > 0]
    params = [
        SamplingParams(temperature=0, max_new_tokens=min(new_tokens, room[i]), stop_token_ids=tuple(stop_ids))
        for i in fitting
    ]
    texts = [""] * len(asked)
    for i, completion in zip(fitting, generate(model, tokenizer, [asked[i].prompt for i in fitting], params)):
        texts[i] = completion.text
    return [Answered(one.group, tokenizer.decode(one.prompt), one.expected, text) for one, text in zip(asked, texts)]


# --- how near ---------------------------------------------------------------------------------------------------------


def by_group(answered: Sequence[Answered], metric: Callable[[Sequence[Answered]], float]) -> dict[str, float]:
    """A metric of each group, in order of appearance."""
    groups: dict[str, list[Answered]] = {}
    for one in answered:
        groups.setdefault(one.group, []).append(one)
    return {group: metric(members) for group, members in groups.items()}


def exact_match(answered: Sequence[Answered]) -> float:
    """The share of answers that are what was expected."""
    return sum(one.answer.strip() == one.expected.strip() for one in answered) / len(answered)


def majority(answered: Sequence[Answered]) -> float:
    """The exact match of whoever always gives the most common of the expected answers."""
    return max(Counter(one.expected.strip() for one in answered).values()) / len(answered)


def bleu(answered: Sequence[Answered]) -> float:
    """BLEU of the whole set, from 0 to 1."""
    sacrebleu = extra("sacrebleu")
    answers, expected = [one.answer for one in answered], [one.expected for one in answered]
    tokenize = "zh" if any(map(CHINESE.search, expected)) else "13a"
    return sacrebleu.corpus_bleu(answers, [expected], tokenize=tokenize).score / 100


def rouge_l(answered: Sequence[Answered]) -> float:
    """The F1 of ROUGE-L, the mean over the answers, from 0 to 1."""
    rouge = extra("rouge_chinese").Rouge(metrics=["rouge-l"])
    pairs = [(words(one.answer), words(one.expected)) for one in answered]
    found = [rouge.get_scores(*pair)[0]["rouge-l"]["f"] if all(pair) else 0.0 for pair in pairs]
    return sum(found) / len(found)


def win_rate(before: Sequence[Answered], after: Sequence[Answered], metric: str) -> float:
    """How often the later answer to a question is nearer to what was expected, a tie being half a win."""
    scores = [[METRICS[metric]([one]) for one in side] for side in (before, after)]
    return sum((later > earlier) + (later == earlier) / 2 for earlier, later in zip(*scores)) / len(after)


def mean_length(answered: Sequence[Answered]) -> float:
    """Characters of an answer, on average."""
    return sum(len(one.answer.strip()) for one in answered) / len(answered)


METRICS: dict[str, Callable[[Sequence[Answered]], float]] = {
    "exact_match": exact_match,
    "bleu": bleu,
    "rouge_l": rouge_l,
}


def words(text: str) -> str:
    """The words of a text, with a space between them."""
    return " ".join(extra("jieba").lcut(text) if CHINESE.search(text) else text.split()).strip()


def check_installed(metrics: Sequence[str]) -> None:
    """Raises ValueError where what a metric needs is not installed."""
    for metric in metrics:
        for module in MODULES.get(metric, ()):
            extra(module)


def extra(module: str) -> ModuleType:
    """A module of the extra `eval`. Raises ValueError where it is not installed."""
    try:
        return import_module(module)
    except ImportError:
        raise ValueError(f"BLEU and ROUGE need {module}: pip install 'minillm[eval]'") from None
