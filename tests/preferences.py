"""Documents that are a prompt with answers, as rows and as a store, and what losses are without rows."""

import numpy as np
import torch

from minillm.data.packing import plan_rows
from minillm.data.rows import gather

V = 40


class Trees:
    """A store in memory. A document is (prompt, {branch: answer})."""

    def __init__(self, documents, split="train"):
        tokens, branches, learned, offsets = [], [], [], [0]
        for prompt, answers in documents:
            tokens += prompt[:-1]
            branches += [0] * (len(prompt) - 1)
            learned += [0] * (len(prompt) - 1)
            for branch, answer in answers.items():
                tokens += [prompt[-1], *answer]
                branches += [branch] * (1 + len(answer))
                learned += [0] + [1] * len(answer)
            offsets.append(len(tokens))
        self.documents, self.split = documents, split
        self.document_offsets, self.n_tokens = np.array(offsets), len(tokens)
        self.read = {"tokens": np.array(tokens, np.uint16)}
        self.read |= {"branches": np.array(branches, np.uint8), "trained": np.array(learned, np.uint8)}

    def __getattr__(self, name):
        if name not in self.__dict__.get("read", {}):
            raise AttributeError(name)
        return lambda start, stop: self.read[name][start:stop]

    def give_reference(self, logprobs):
        self.read["reference"] = logprobs

    def source(self, document):
        return f"trees:{document + 1}"

    def batch(self, T):
        """All documents, packed in rows of T."""
        plan = plan_rows(self.document_offsets, T)
        return gather([(self, plan.pieces(row)) for row in range(plan.n_rows)], T, True)

    def alone(self):
        """All documents, each in a row of its own."""
        starts, lengths = self.document_offsets[:-1], np.diff(self.document_offsets) - 1
        spans = [([start], [length]) for start, length in zip(starts.tolist(), lengths.tolist())]
        return gather([(self, span) for span in spans], int(lengths.max()), True)


def some_documents(n, branches=(1, 2), seed=0, longest=7):
    """Random ones; `branches` of each, or functions of its number."""
    generator = np.random.default_rng(seed)

    def text():
        return generator.integers(1, V, generator.integers(1, longest + 1)).tolist()

    return [
        (text(), {branch: text() for branch in (branches(i) if callable(branches) else branches)}) for i in range(n)
    ]


def unpaired(i):
    """The branches of a document that is desirable or not, with another's answer."""
    return (1 if i % 3 else 2, 3)


def answer_logprobs(model, documents):
    """For each document {branch: log p of each token of the answer}, each in a forward of its own."""
    found = []
    for prompt, answers in documents:
        found.append({})
        for branch, answer in answers.items():
            logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
            found[-1][branch] = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
    return found
