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
from torch import nn

from minillm.data.chat import render_all
from minillm.data.chat_templates import ChatTemplate, Message
from minillm.data.prompt_rows import PromptRow, asked_as
from minillm.generate.forward import completion_logprobs, evaluating
from minillm.generate.params import SamplingParams
from minillm.generate.request import Request
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
        found = [mean_logprob(reward, row.prompt, one.text) for one in answers]
    return [Scored(one.text, score, one.finished) for one, score in zip(answers, found) if score is not None]


def mean_logprob(judge: Respondent, prompt: Sequence[Message], text: str) -> float | None:
    """That of the tokens of an answer with its end, in nats; None where the model's context does not hold them."""
    asked, learned = asked_and_answered(judge, prompt, text)
    if len(asked) + len(learned) > judge.model.config.max_seq_len:
        return None
    request = Request(asked, SamplingParams(), len(learned), ())
    with torch.inference_mode(), evaluating(judge.model):
        found = completion_logprobs(judge.model, request, learned)
    return sum(one.logprob for one in found) / len(found)


def asked_and_answered(judge: Respondent, prompt: Sequence[Message], text: str) -> tuple[list[int], list[int]]:
    """The tokens of a prompt and of an answer with its end, as they are learned."""
    if judge.template is not None:
        [whole] = render_all(judge.template, judge.tokenizer, [[*prompt, Message("assistant", text)]])
        start, stop = whole.answers[-1]
        return whole.tokens[:start].tolist(), whole.tokens[start:stop].tolist()
    end = [] if judge.tokenizer.eos_id is None else [judge.tokenizer.eos_id]
    return judge.ask(prompt)[0], judge.tokenizer.encode_inside(text).tolist() + end


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
