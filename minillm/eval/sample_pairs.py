"""`minillm data sample-pairs`: a model answers each prompt several times; the best and the worst answer become a pair.

    prompts --> answers, many at a time --> scores --> the best and the worst --> {"prompt", "chosen", "rejected"}

Every answer has random numbers of its own, by the seed, the prompt's place in the files and the answer's number, so
what is written does not depend on how many are made at once, or on whether the work was interrupted:

    .OUT.partial/         beside OUT, until that is there as a whole
        prompts.jsonl     what all depends on, then a line for each prompt that is done
"""

import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from minillm.data.order import make_key
from minillm.data.prompt_rows import PromptFiles, PromptRow, asked_as
from minillm.eval.scores import Answer, Respondent, Score, Scored
from minillm.files import explained, fsync_directory, locked
from minillm.generate.engine import Engine, default_rows
from minillm.generate.params import GREATEST_SEED, SamplingParams
from minillm.generate.request import Request, make_request

AHEAD = 4  # prompts that may be worked on for each row of the engine, where one takes much longer than the rest
# Why a prompt gives no pair.
REASONS = {
    "long": "leave no room for an answer",
    "few": "have fewer than two different answers that can be compared",
    "cut": "have no answer that came to its end",
    "tied": "have no answer that came to its end and is better than another",
    "near": "have scores nearer to each other than the margin",
}


class Outcome(NamedTuple):
    """What became of a prompt: a pair, or the reason why there is none."""

    pair: dict[str, Any] | None
    reason: str | None = None


class Sampled(NamedTuple):
    """What was written."""

    n_prompts: int
    n_pairs: int
    dropped: Mapping[str, int]  # of REASONS
    bad: Sequence[str]  # rows that were left out
    chosen_length: float  # characters, the mean
    rejected_length: float


def sample_pairs(
    respondent: Respondent,
    prompts: PromptFiles,
    params: SamplingParams,
    score: Score,
    out: str | Path,
    *,
    margin: float = 0.0,
    made_of: Mapping[str, Any] | None = None,
    max_rows: int | None = None,
    progress: bool | None = None,
) -> Sampled:
    """Write the pairs of a model's answers to `out`, going on where an interrupted call of the same kind stopped.

    Args:
        params: how answers are made; `n` of them a prompt.
        margin: the least by which the scores of a pair differ.
        made_of: what tells whether interrupted work is that of the same models, files and settings.
        max_rows: answers made at once; None: as many as fit well.
        progress: whether a bar is shown; None: where there is a terminal.

    Raises ValueError for rows that are no prompts, where no prompt gives a pair, and where `out` exists.
    """
    out, bad = Path(out), []
    check_free(out)
    if params.n < score.least:
        raise ValueError(f"n: {params.n} answers to a prompt make no pair; this score compares {score.least} or more")
    prompts = prompts._replace(answered=score.answered, template=respondent.template)
    total = longest = 0
    for _, request in requests(respondent, prompts, params, bad):  # all of it once, so that bad rows are named now
        total += 1
        longest = max(longest, request.length if request else 0)
    if not longest:
        wrong = f"all {total} {REASONS['long']}" if total else f"there are none{f'; {bad[0]}' if bad else ''}"
        raise ValueError(f"prompts: {wrong}")
    folder = out.with_name(f".{out.name}.partial")
    with locked(folder / "lock"), explained(out):
        check_free(out)
        done = folder / "prompts.jsonl"
        n_done = continued(done, made_of or {})
        engine = Engine(
            respondent.model,
            respondent.tokenizer,
            max_rows=max_rows or min(total * params.n, default_rows(respondent.model, longest)),
            capacity=longest,
        )
        left = requests(respondent, prompts, params, skip=n_done)
        disable = None if progress is None else not progress
        with (
            open(done, "a", encoding="utf-8") as file,
            tqdm(total=total, initial=n_done, unit=" prompts", desc="sampling", disable=disable, leave=False) as bar,
        ):
            for row, request in answered(engine, left):
                file.write(json.dumps(outcome(row, request, score, margin), ensure_ascii=False) + "\n")
                file.flush()
                bar.update()
        sampled = write_pairs(done, folder / "pairs.jsonl", bad)
        if sampled.n_pairs:
            os.replace(folder / "pairs.jsonl", out)
            fsync_directory(out.parent)
        shutil.rmtree(folder)
    if not sampled.n_pairs:
        why = ", ".join(f"{count} {REASONS[reason]}" for reason, count in sampled.dropped.items())
        raise ValueError(f"{out}: not written: none of {sampled.n_prompts} prompts gives a pair: {why}")
    return sampled


def check_free(out: Path) -> None:
    """Raises ValueError where something has that name."""
    if out.suffix != ".jsonl":
        raise ValueError(f"out: {out}: pairs are written as .jsonl; give a name that ends so")
    if out.exists():
        raise ValueError(f"out: {out} exists; choose another name")


# --- answers ----------------------------------------------------------------------------------------------------------


def requests(
    respondent: Respondent, prompts: PromptFiles, params: SamplingParams, bad: list[str] | None = None, skip: int = 0
) -> Iterator[tuple[PromptRow, Request | None]]:
    """Each prompt from the `skip`-th on, with what is asked of the model; None where there is no room for an answer."""
    model, tokenizer = respondent.model, respondent.tokenizer
    for number, row in enumerate(prompts.rows(bad)):
        if number < skip:
            continue
        tokens, stops = respondent.ask(row.prompt)
        request = None
        if len(tokens) + (params.max_new_tokens or 1) <= model.config.max_seq_len:
            seed = None if params.seed is None else make_key(params.seed, number) & GREATEST_SEED
            own = replace(params, seed=seed, stop_token_ids=(*params.stop_token_ids, *stops))
            request = make_request(model.config, tokenizer, tokens, own)
        yield row, request


def answered(
    engine: Engine, asked: Iterator[tuple[PromptRow, Request | None]]
) -> Iterator[tuple[PromptRow, Request | None]]:
    """The same in the same order, once the requests are done; the rows of the engine are kept busy."""
    begun: deque[tuple[PromptRow, Request | None]] = deque()
    while True:
        while len(engine.waiting) < engine.max_rows and len(begun) < AHEAD * engine.max_rows:
            one = next(asked, None)
            if one is None:
                break
            begun.append(one)
            if one[1] is not None:
                engine.queue(one[1])
        if not begun:
            return
        while begun and (begun[0][1] is None or begun[0][1].done):
            yield begun.popleft()
        engine.step()


# --- pairs ------------------------------------------------------------------------------------------------------------


def outcome(row: PromptRow, request: Request | None, score: Score, margin: float) -> Outcome:
    """What becomes of the answers to a prompt."""
    if request is None:
        return Outcome(None, "long")
    different: dict[str, Answer] = {}
    for one in request.completions:
        answer = Answer(one.text, one.finish_reason == "stop", one.cumulative_logprob / len(one.tokens))
        if one.text.strip() and "\0" not in one.text:  # which no file of text may hold
            different.setdefault(one.text.strip(), answer)
    return pair_of(row, score.scorer(row, list(different.values())), margin)


def pair_of(row: PromptRow, answers: Sequence[Scored], margin: float = 0.0) -> Outcome:
    """The best answer and the worst as a pair; white space around them makes no difference."""
    if len({one.text.strip() for one in answers}) < 2:
        return Outcome(None, "few")
    good = [one for one in answers if one.may_be_chosen]
    if not good:
        return Outcome(None, "cut")
    best, worst = max(good, key=by_score), min(answers, key=by_score)
    if best.score <= worst.score:
        return Outcome(None, "tied")
    if best.score - worst.score < margin:
        return Outcome(None, "near")
    scores = {"chosen_score": round(best.score, 6), "rejected_score": round(worst.score, 6)}
    return Outcome(asked_as(row.prompt) | {"chosen": best.text, "rejected": worst.text} | scores)


def by_score(answer: Scored) -> float:
    return answer.score


# --- files ------------------------------------------------------------------------------------------------------------


def continued(done: Path, made_of: Mapping[str, Any]) -> int:
    """How many prompts are done already; a line that was not written to its end is cut off.

    Raises ValueError where they are those of other models, files or settings.
    """
    made_of = json.loads(json.dumps(made_of))
    with open(done, "a+b") as file:
        file.seek(0)
        first = file.readline()
        if not is_whole(first):
            file.truncate(0)
            file.write(json.dumps(made_of).encode() + b"\n")
            return 0
        before = json.loads(first)
        if before != made_of:
            other = [name for name in before | made_of if before.get(name) != made_of.get(name)]
            raise ValueError(
                f"{done.parent}: interrupted work that differs in {', '.join(other)}; give the same as then to go on, "
                "or remove that folder, or choose another OUT"
            )
        n_done, end = 0, file.tell()
        while is_whole(file.readline()):
            n_done, end = n_done + 1, file.tell()
        file.truncate(end)
    return n_done


def is_whole(line: bytes) -> bool:
    """Whether a line was written to its end."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n")


def write_pairs(done: Path, out: Path, bad: Sequence[str]) -> Sampled:
    """Write the pairs of the prompts that are done, and count the rest."""
    dropped: Counter[str] = Counter()
    n_pairs, lengths = 0, dict.fromkeys(("chosen", "rejected"), 0)
    with open(done, encoding="utf-8") as file, open(out, "w", encoding="utf-8") as pairs:
        next(file)  # what the work is of
        for line in file:
            pair, reason = Outcome(*json.loads(line))
            if pair is None:
                dropped[reason] += 1
                continue
            pairs.write(json.dumps(pair, ensure_ascii=False) + "\n")
            n_pairs += 1
            for side in lengths:
                lengths[side] += len(pair[side])
        pairs.flush()
        os.fsync(pairs.fileno())
    means = [length / max(1, n_pairs) for length in lengths.values()]
    return Sampled(n_pairs + dropped.total(), n_pairs, dropped, bad, *means)
