"""How good each of several answers to a prompt is: what makes the best and the worst of them a pair.

given         the answer that the file gives is the best; of the others, the nearer to it the better
logprob       the mean log-probability of an answer's tokens, under the model that wrote it or another one
FILE.py:NAME  a function of your own
"""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from minillm.data.batch import Batch
from minillm.data.chat import render_all
from minillm.data.chat_templates import ChatTemplate, Message
from minillm.data.prompt_rows import PromptRow, asked_as
from minillm.data.trees import Answer as Branch
from minillm.data.trees import Tree
from minillm.generate.forward import evaluating
from minillm.losses import IGNORE_INDEX
from minillm.preference import target_logprobs
from minillm.tokenizer import Tokenizer


class Respondent(NamedTuple):
    """A model, and how it is given a conversation."""

    model: nn.Module
    tokenizer: Tokenizer
    ask: Callable[[Sequence[Message]], tuple[list[int], tuple[int, ...]]]  # the prompt, and what ends an answer to it
    template: ChatTemplate | None  # None: a text, which it continues


class Answer(NamedTuple):
    """What a model said."""

    text: str
    finished: bool  # it has come to an end
    logprob: float  # of its tokens, the mean


class Scored(NamedTuple):
    """An answer and how good it is."""

    text: str
    score: float
    may_be_chosen: bool


Scorer = Callable[[PromptRow, Sequence[Answer]], list[Scored]]


class Score(NamedTuple):
    """A way to tell good answers from bad ones."""

    scorer: Scorer
    least: int = 2  # answers of the model that it takes to make a pair
    answered: bool = False  # whether rows have to give an answer
    file: str | None = None  # of the function


def find_score(name: str, reward: Respondent | None = None) -> Score:
    """The score that --score names; `reward` is the model of logprob. Raises ValueError where there is none."""
    if name in SCORES:
        return SCORES[name](reward)
    if ":" not in name:
        raise ValueError(f"score: {name!r} is none of {', '.join(SCORES)}, and no FILE.py:NAME of a function")
    return Score(partial(by_function, name, load_function(name)), file=name.rpartition(":")[0])


# --- the given answer -------------------------------------------------------------------------------------------------


def against_given(row: PromptRow, answers: Sequence[Answer]) -> list[Scored]:
    """The given answer, 1, and how similar the others are to it: they are never chosen."""
    given = row.answer
    found = [similarity(given.strip(), one.text.strip()) for one in answers]
    return [Scored(given, 1.0, True), *(Scored(one.text, score, False) for one, score in zip(answers, found))]


def similarity(a: str, b: str) -> float:
    """From 0 to 1, equal: 1 less the edit distance, as a share of the longer text's characters."""
    return 1 - edit_distance(a, b) / max(len(a), len(b), 1)


def edit_distance(a: str, b: str) -> int:
    """The fewest characters to insert, remove or replace that make one text the other (Levenshtein 1966)."""
    first, second = (np.frombuffer(text.encode("utf-32-le"), "<u4") for text in (a, b))
    places = np.arange(len(second) + 1)
    row = places  # row[j]: from as much of a as was read to b[:j]
    for number, character in enumerate(first, 1):
        changed = np.minimum(row[1:] + 1, row[:-1] + (second != character))  # it is removed, or replaced
        row = np.append(number, changed)
        row = np.minimum.accumulate(row - places) + places  # insertions after the best of the places before
    return int(row[-1])


# --- likelihood -------------------------------------------------------------------------------------------------------


def by_likelihood(reward: Respondent | None, row: PromptRow, answers: Sequence[Answer]) -> list[Scored]:
    """How likely a model finds the answers: `reward`, or the one that wrote them; none of those too long for it."""
    if reward is None:
        found = [one.logprob for one in answers]
    else:
        found = mean_logprobs(reward, row.prompt, [one.text for one in answers])
    return [Scored(one.text, score, one.finished) for one, score in zip(answers, found) if score is not None]


def mean_logprobs(judge: Respondent, prompt: Sequence[Message], texts: Sequence[str]) -> list[float | None]:
    """That of the tokens of each answer with its end, in nats; None where the model's context does not hold them.

    As many answers as its context holds go through the model together, behind one prompt.
    """
    if not texts:
        return []
    asked, answers = asked_and_answered(judge, prompt, texts)
    found: list[float | None] = [None] * len(texts)
    with torch.inference_mode(), evaluating(judge.model):
        for numbers in rows_of(len(asked), list(map(len, answers)), judge.model.config.max_seq_len):
            here = [answers[number] for number in numbers]
            for number, logprobs in zip(numbers, answer_logprobs(judge.model, asked, here)):
                found[number] = logprobs.mean().item()
    return found


def asked_and_answered(
    judge: Respondent, prompt: Sequence[Message], texts: Sequence[str]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The tokens of a prompt, and of each answer with its end, as they are learned."""
    if judge.template is not None:
        conversations = [[*prompt, Message("assistant", text)] for text in texts]
        rendered = render_all(judge.template, judge.tokenizer, conversations)
        places = [(whole.tokens, *whole.answers[-1]) for whole in rendered]
        tokens, start, _ = places[0]  # before each answer stands the same
        return tokens[:start], [tokens[start:stop] for tokens, start, stop in places]
    end = [] if judge.tokenizer.eos_id is None else [judge.tokenizer.eos_id]
    answers = [judge.tokenizer.encode_inside(text).tolist() + end for text in texts]
    return np.array(judge.ask(prompt)[0]), list(map(np.array, answers))


def rows_of(asked: int, answers: Sequence[int], context: int) -> list[list[int]]:
    """The answers of each row, by number: as many as the context holds behind a prompt of that length; all are lengths.

    Those that it does not hold behind the prompt alone are in none.
    """
    rows: list[list[int]] = []
    length = context  # of the last row: it is full
    for number, answer in enumerate(answers):
        if asked + answer > context:
            continue
        if length + answer > context:
            rows.append([])
            length = asked - 1
        rows[-1].append(number)
        length += 1 + answer  # each begins with a copy of the prompt's last token
    return rows


def answer_logprobs(model: nn.Module, asked: np.ndarray, answers: Sequence[np.ndarray]) -> tuple[Tensor, ...]:
    """log p of each token of answers to one prompt, which are its branches and so do not see each other."""
    branches = [Branch(1 + number % 2, answer, np.ones(len(answer), bool)) for number, answer in enumerate(answers)]
    tree = Tree(asked, branches)
    # the inputs, and behind them the last target: both (1, T + 1)
    tokens, marks = (torch.from_numpy(array.astype(np.int64))[None] for array in (tree.tokens(), tree.marks()))
    targets = tokens[:, 1:].where(marks[:, 1:] % 2 == 1, IGNORE_INDEX)
    batch = Batch(tokens[:, :-1], targets, branches=marks[:, :-1] // 2)
    logprobs = target_logprobs(model, batch.to(next(model.parameters()).device), model.config.vocab_size)
    return logprobs[:, targets[0] != IGNORE_INDEX][0].split(list(map(len, answers)))


# --- a function -------------------------------------------------------------------------------------------------------


def load_function(place: str) -> Callable[[Any, str, Mapping[str, Any]], float]:
    """The function that FILE.py:NAME says; the file's code is run. Raises ValueError where that cannot be done."""
    file, _, name = place.rpartition(":")
    if not Path(file).is_file():
        raise ValueError(f"score: {file}: no such file; FILE.py:NAME of a function is expected")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"score: {file}: no Python file; its name has to end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"score: {file} fails: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"score: there is no function {name} in {file}")
    return function


def by_function(name: str, function: Callable, row: PromptRow, answers: Sequence[Answer]) -> list[Scored]:
    """What the function says of (prompt, answer, row of the file). Raises ValueError where it fails."""
    return [Scored(one.text, called(name, function, row, one.text), one.finished) for one in answers]


def called(name: str, function: Callable, row: PromptRow, text: str) -> float:
    try:
        score = float(function(asked_as(row.prompt)["prompt"], text, row.row))
    except Exception as error:
        raise ValueError(f"{row.source}: {name} fails: {type(error).__name__}: {error}") from error
    if not math.isfinite(score):
        raise ValueError(f"{row.source}: {name} gives {score}; a finite number is expected")
    return score


SCORES: dict[str, Callable[[Respondent | None], Score]] = {
    "given": lambda _: Score(against_given, least=1, answered=True),
    "logprob": lambda reward: Score(partial(by_likelihood, reward)),
}
