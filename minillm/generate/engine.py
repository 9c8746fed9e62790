"""Text from a model: requests wait, are read, grow by a token a step together, and leave.

    waiting         [F] [E] [D]                   admitted in order, as many as there are rows free
                       |
    prompts         DDDDDDDEEEE                   read in one row, end to end: no padding, and each sees only itself;
                       |                          keys and values go into the slots of the cache
    rows   0        A A A A A A A a               each row is a slot; a step reads one token of each, at its own place
           1        B B B b
           2        C C C C C c                   a row that ends leaves at once, and the last row takes its slot:
           3        D D D D D D D d               the rows in use are always the first
           4        E E E E e
           .

A step is one forward: of new prompts where some can begin, else of a token in each row. Nothing depends on what else is
in the batch: every completion has random numbers of its own, and no row sees another.

Shapes: n or B rows, V vocab.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from minillm.generate.cache import KVCache
from minillm.generate.forward import compiled_next_logits, completion_logprobs, evaluating, next_logits, prompt_logits
from minillm.generate.logprobs import token_logprobs
from minillm.generate.packed import FEWEST_ROWS, can_pack, pack
from minillm.generate.params import SamplingParams
from minillm.generate.request import Prompt, Request, make_request
from minillm.generate.rows import Sample, Search, choose_tokens
from minillm.tokenizer import Tokenizer

PROMPT_TOKENS = 4096  # read at once, at most: enough to keep any device busy, and little enough to fit into its memory
# A step reads all weights once and the keys of every row. Where the keys are as large as the weights, more rows could
# no more than halve the time a token takes; a model so small that its weights take no time gets this much anyway.
LEAST_CACHE_BYTES = 2**30
MOST_ROWS = 128
STEPS_BEFORE_PACKING = 4  # packing the weights takes as long as some 5 steps of 8 rows, and saves half of each


@dataclass(frozen=True)
class Event:
    """What a step added to one completion of a request."""

    request: Request
    index: int  # which of its completions, in the order they were begun
    text: str  # what has become certain: never a part of a character, or of what may become a stop text
    finished: bool  # whether this ended it


class Engine:
    """Completes any number of requests, which may come at any time, `max_rows` completions at once.

    While it is busy the model's weights must stay what they are.

        engine = Engine(model, tokenizer)
        request = engine.add("Once upon a time", SamplingParams(n=2))
        while engine.busy:
            for event in engine.step():
                print(event.index, event.text)
        print(request.completions)

    Args:
        max_rows: by default as many as keep the cache no larger than the weights, or 1 GiB; at most 128.
        capacity: tokens that a prompt and its completion may have together; by default the model's max_seq_len.
        compile: one kernel launch a step where there is a GPU (CUDA graphs); the first steps take minutes.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer | None = None,
        *,
        max_rows: int | None = None,
        capacity: int | None = None,
        compile: bool = False,
    ):
        self.model, self.tokenizer, self.compile = model, tokenizer, compile
        self.device = next(model.parameters()).device
        self.capacity = capacity or model.config.max_seq_len
        self.max_rows = default_rows(model, self.capacity) if max_rows is None else max_rows
        if self.max_rows < 1:
            raise ValueError(f"max_rows: must be at least 1, not {max_rows}")
        slots = power_of_two(self.max_rows) if compile else self.max_rows
        self.cache = KVCache(model.config.n_layers, slots, self.capacity, static=compile)
        self.known = tokenizer.vocab_size if tokenizer else model.config.vocab_size  # some models have more ids
        self.waiting: deque[Sample | Search] = deque()
        self.rows: list[Sample | Search] = []  # who has each slot in use
        self.next: list[int] = []  # the token that each of them reads next
        self.ended: dict[Request, list[Sample]] = {}  # of requests that are not done, the completions that are
        self.packed: nn.Module | None = None  # the model once more, faster with many rows, while there are some
        self.steps_of_rows = 0  # that it would have been faster at, since the engine was idle

    @property
    def busy(self) -> bool:
        """Whether a request waits or is being worked on."""
        return bool(self.waiting or self.rows)

    def add(self, prompt: Prompt, params: SamplingParams | None = None) -> Request:
        """A request that the next steps work on; ValueError where the model or the engine cannot do what is asked."""
        request = make_request(self.model.config, self.tokenizer, prompt, params)
        self.queue(request)
        return request

    def queue(self, request: Request) -> None:
        """The same for a request that is made already."""
        params = request.params
        if request.length > self.capacity:
            raise ValueError(
                f"prompt and max_new_tokens make {request.length}; the engine has room for {self.capacity}"
            )
        if params.num_beams > self.max_rows:
            raise ValueError(f"num_beams: {params.num_beams} are more than the engine's max_rows {self.max_rows}")
        if params.use_beam_search:
            self.waiting.append(Search(request))
        else:
            self.waiting.extend(Sample(request, i, self.tokenizer) for i in range(request.n_samples))

    def cancel(self, request: Request) -> None:
        """Nothing more is done for a request; its rows go to those that wait."""
        self.waiting = deque(owner for owner in self.waiting if owner.request is not request)
        self.free([slot for slot, owner in enumerate(self.rows) if owner.request is request])
        self.ended.pop(request, None)
        self.rest()

    def step(self) -> list[Event]:
        """One forward, and what it added; nothing where the engine is not busy."""
        if not self.busy:
            return []
        # inference mode is the faster of the two; CUDA graphs want tensors of the usual kind
        with torch.no_grad() if self.compile else torch.inference_mode(), evaluating(self.model):
            begun = self.admit()
            owners = begun or list(self.rows)
            logits = self.read_prompts(begun) if begun else self.read_next()
            events = self.take_tokens(owners, logits)
        self.rest()
        return events

    # --- rows ---

    def admit(self) -> list[Sample | Search]:
        """Gives free slots to those that waited longest."""
        begun = []
        while self.waiting and len(self.rows) + self.waiting[0].n_rows <= self.max_rows:
            owner = self.waiting.popleft()
            owner.slots = list(range(len(self.rows), len(self.rows) + owner.n_rows))
            self.rows += [owner] * owner.n_rows
            self.next += [0] * owner.n_rows
            begun.append(owner)
        return begun

    def free(self, slots: Sequence[int]) -> None:
        """The slots' owners leave; the last rows move up into the gaps."""
        for slot in sorted(slots, reverse=True):
            last = len(self.rows) - 1
            if slot < last:
                mover = self.rows[last]
                mover.slots[mover.slots.index(last)] = slot
                self.rows[slot], self.next[slot] = mover, self.next[last]
                self.cache.copy([last], [slot])
            del self.rows[last], self.next[last]

    # --- forwards ---

    def read_prompts(self, begun: Sequence[Sample | Search]) -> Tensor:
        """Logits after the prompt of each that begins, (n, V); samples of one prompt share the reading of it."""
        first: dict[Request, Sample | Search] = {}
        for owner in begun:
            first.setdefault(owner.request, owner)
        limit = min(PROMPT_TOKENS, self.model.config.max_seq_len)
        groups: list[list[Request]] = []
        total = limit
        for request in first:
            total += len(request.prompt)
            if total > limit:
                groups.append([])
                total = len(request.prompt)
            groups[-1].append(request)
        logits = torch.cat([self.read_packed(group, [first[r].slots[0] for r in group]) for group in groups])
        self.cache.copy([first[owner.request].slots[0] for owner in begun], [owner.slots[0] for owner in begun])
        number = {request: i for i, request in enumerate(first)}
        return logits[[number[owner.request] for owner in begun]]

    def read_packed(self, requests: Sequence[Request], slots: Sequence[int]) -> Tensor:
        """Reads prompts packed in one row into slots; logits after each of them, (n, V)."""
        caches = self.cache.packed_prompts(slots, [len(request.prompt) for request in requests])
        return prompt_logits(self.packed or self.model, requests, caches)

    def read_next(self) -> Tensor:
        """Reads the next token of each row; logits after it, (B, V)."""
        n = len(self.rows)
        if not self.compile:
            tokens = torch.tensor(self.next, device=self.device)[:, None]  # (B, 1)
            return next_logits(self.faster_model(n), tokens, self.cache.next_tokens(n, self.device))
        padded = power_of_two(n)  # few shapes, each compiled once
        tokens = torch.tensor(self.next + [0] * (padded - n), device=self.device)[:, None]
        return compiled_next_logits()(self.model, tokens, self.cache.next_tokens(n, self.device, padded))[:n]

    def faster_model(self, rows: int) -> nn.Module:
        """The model for a step of so many rows: packed, once there were enough steps for it."""
        if rows >= FEWEST_ROWS and self.packed is None:
            self.steps_of_rows += 1
            if self.steps_of_rows == STEPS_BEFORE_PACKING and can_pack(self.model):
                self.packed = pack(self.model)
        return self.packed or self.model

    def rest(self) -> None:
        """Give back what is only worth its memory while there is something to do."""
        if not self.busy:
            self.packed, self.steps_of_rows = None, 0

    # --- tokens ---

    def take_tokens(self, owners: Sequence[Sample | Search], logits: Tensor) -> list[Event]:
        """Each owner goes on by a token after its logits (n, V), in the order of slots; those that end leave."""
        rows_of: dict[Sample | Search, list[int]] = {}
        for row, owner in enumerate(owners):
            rows_of.setdefault(owner, []).append(row)
        samples = [owner for owner in rows_of if isinstance(owner, Sample)]
        searches = [owner for owner in rows_of if isinstance(owner, Search)]
        events = []
        if samples:
            own = logits[[rows_of[sample][0] for sample in samples]] if searches else logits
            events = self.extend_samples(samples, own)
        for search in searches:
            events += self.extend_search(search, logits[rows_of[search]])
        return events

    def extend_samples(self, samples: Sequence[Sample], logits: Tensor) -> list[Event]:
        chosen = choose_tokens(samples, logits[:, : self.known])
        told = token_logprobs(logits, chosen, [sample.request.params.logprobs or 0 for sample in samples])
        events = []
        for sample, token in zip(samples, told):
            text = sample.add(token)
            self.next[sample.slots[0]] = token.token
            events.append(Event(sample.request, sample.index, text, sample.finish_reason is not None))
        ended = [sample for sample in samples if sample.finish_reason]
        self.free([sample.slots[0] for sample in ended])
        for sample in ended:
            self.end(sample)
        return events

    def end(self, sample: Sample) -> None:
        """Once all samples of a request have ended, the request is done with the best of them."""
        request = sample.request
        all_ended = self.ended.setdefault(request, [])
        all_ended.append(sample)
        n = request.params.n
        if len(all_ended) == request.n_samples:
            made = [sample.completion() for sample in sorted(self.ended.pop(request), key=lambda sample: sample.index)]
            if request.n_samples > n:
                made.sort(key=lambda one: one.cumulative_logprob / len(one.tokens), reverse=True)
            request.completions = made[:n]

    def extend_search(self, search: Search, logits: Tensor) -> list[Event]:
        parents, tokens = search.advance(logits, self.known)
        if tokens:
            self.cache.copy([search.slots[parent] for parent in parents], search.slots)
            for slot, token in zip(search.slots, tokens):
                self.next[slot] = token
            return []
        self.free(search.slots)
        search.request.completions = search.completions(self.tokenizer, partial(completion_logprobs, self.model))
        return [
            Event(search.request, index, completion.text, True)
            for index, completion in enumerate(search.request.completions)
        ]


def default_rows(model: nn.Module, capacity: int) -> int:
    """How many completions an engine makes at once."""
    config, weights = model.config, [*model.parameters(), *model.buffers()]
    number = max(weight.element_size() for weight in weights)
    row_bytes = 2 * config.n_layers * config.n_kv_heads * config.head_dim * capacity * number
    room = max(sum(weight.nbytes for weight in weights), LEAST_CACHE_BYTES)
    return max(1, min(room // row_bytes, MOST_ROWS))


def power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()
