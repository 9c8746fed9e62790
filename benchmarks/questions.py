"""Whether a small model can learn the questions of the embedded stories: exact match before and after short tuning.

python train.py && python benchmarks/questions.py runs/quickstart

Trains on the answers alone, of questions of the training split; asks those of the held-out split, greedily.
"""

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch

import minillm
from minillm.data.batch import Batch
from minillm.data.rows import number_pieces
from minillm.data.stories import Question, questions
from minillm.data.stories.questions import FAMILIES
from minillm.distributed.context import connect
from minillm.losses import IGNORE_INDEX
from minillm.objectives import NextToken
from minillm.optim import OptimConfig, build_optimizer, lr_at
from minillm.tokenizer import Tokenizer
from minillm.trainer import TrainConfig, Trainer


def prompt_and_answer(tokenizer: Tokenizer, question: Question) -> tuple[list[int], list[int]]:
    """One text, cut where the answer begins; the answer ends with </s>."""
    prompt = f"{question.context} {question.question}".strip()
    answer = tokenizer.encode(f" {question.answer}")
    return [tokenizer.bos_id, *tokenizer.encode(prompt)], [*answer, tokenizer.eos_id]


class Answers:
    """A loader of packed rows in which only the answers are targets."""

    def __init__(self, tokenizer: Tokenizer, asked: list[Question], rows_per_step: int, row: int = 256):
        self.rows: list[list[tuple[list[int], list[int]]]] = [[]]  # pieces: (inputs, targets)
        self.row, free = row, row
        for question in asked:
            prompt, answer = prompt_and_answer(tokenizer, question)
            inputs, targets = [*prompt, *answer[:-1]], [IGNORE_INDEX] * (len(prompt) - 1) + answer
            if len(inputs) > free:
                self.rows.append([])
                free = row
            self.rows[-1].append((inputs, targets))
            free -= len(inputs)
        self.samples_per_step, self.tokens_per_step = rows_per_step, rows_per_step * row
        self.samples_per_epoch = len(self.rows)

    def batches(self, cursor: int) -> list[Batch]:
        rows = self.rows[cursor : cursor + self.samples_per_step]
        tokens = torch.zeros(len(rows), self.row, dtype=torch.int64)
        targets = torch.full_like(tokens, IGNORE_INDEX)
        for row, pieces in enumerate(rows):
            length = sum(len(inputs) for inputs, _ in pieces)
            tokens[row, :length] = torch.tensor([token for inputs, _ in pieces for token in inputs])
            targets[row, :length] = torch.tensor([token for _, aims in pieces for token in aims])
        lengths = [[len(inputs) for inputs, _ in pieces] for pieces in rows]
        return [Batch(tokens, targets, *torch.from_numpy(number_pieces(lengths, self.row)))]


def exact_match(model: minillm.Transformer, tokenizer: Tokenizer, asked: list[Question]) -> dict[str, float]:
    """The share of questions of each family whose greedy answer is the right one."""
    right, params = Counter(), minillm.SamplingParams(temperature=0, max_new_tokens=12)
    for question in asked:
        prompt, _ = prompt_and_answer(tokenizer, question)
        right[question.family] += minillm.generate(model, tokenizer, prompt, params).text.strip() == question.answer
    totals = Counter(question.family for question in asked)
    return {family: right[family] / totals[family] for family in FAMILIES}


def majority(asked: list[Question], family: str) -> float:
    """The share that the most common answer alone would get right."""
    answers = Counter(question.answer for question in asked if question.family == family)
    return max(answers.values()) / sum(answers.values())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default="runs/quickstart")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=8, help="rows a step")
    parser.add_argument("--row", type=int, default=256, help="tokens a row")
    parser.add_argument("--asked", type=int, default=600, help="held-out questions")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--muon_lr", type=float, default=3e-3)
    given = parser.parse_args(argv)

    model, tokenizer = minillm.load(given.run)
    heldout = list(questions(1, given.asked, "heldout"))
    before = exact_match(model, tokenizer, heldout)
    optim = OptimConfig(name="muon", lr=given.lr, muon_lr=given.muon_lr, warmup_steps=given.steps // 10)
    with connect() as dist:
        started = time.perf_counter()
        loader = Answers(tokenizer, list(questions(0, given.steps * given.rows * 8)), given.rows, given.row)
        steps = min(given.steps, len(loader.rows) // given.rows)
        trainer = Trainer(
            model.train(),
            build_optimizer(model, optim),
            NextToken(model.config.vocab_size),
            loader,
            TrainConfig(),
            steps=steps,
            lr_at=partial(lr_at, config=optim, max_steps=steps),
            dist=dist,
        )
        trainer.fit()
        seconds = time.perf_counter() - started
    after = exact_match(model.eval(), tokenizer, heldout)
    print(f"{steps} steps of {loader.tokens_per_step:,} tokens in {seconds:.0f} s\n")
    print("| family | answers | most common answer | before | after |\n|---|---|---|---|---|")
    for family in FAMILIES:
        answers = len({question.answer for question in heldout if question.family == family})
        shares = (majority(heldout, family), before[family], after[family])
        print(f"| {family} | {answers} | " + " | ".join(f"{share:.0%}" for share in shares) + " |")


if __name__ == "__main__":
    main()
