"""Prompts for the samples at the end of a run: beginnings of documents, held out ones where there are any."""

from minillm.data.mixture import Source
from minillm.data.store import TokenStore


def prompts_of(sources: list[Source], count: int, length: int, eos_id: int) -> list[tuple[str, list[int]]]:
    """(source, prompt) of so many beginnings, the sources in turn."""
    found = []
    for number, source in enumerate(sources[:count]):
        store = source.prepared.val or source.prepared.train
        mine = len(range(number, count, len(sources)))
        found += [(source.name, prompt) for prompt in beginnings(store, mine, max(1, length), eos_id)]
    return found


def beginnings(store: TokenStore, count: int, length: int, eos_id: int) -> list[list[int]]:
    """Token prompts from evenly spaced places: the starts of documents, or anywhere in a text of few."""
    many = store.n_documents >= count
    if many:
        starts = [int(store.document_offsets[i * store.n_documents // count]) for i in range(count)]
    else:
        starts = [i * store.n_tokens // count for i in range(count)]
    found = [store.tokens(start, min(start + length, store.n_tokens)).tolist() for start in starts]
    if (
        not many
    ):  # in the middle of a text an end may come first; at its start only what begins it, which may be the same
        found = [prompt[prompt[0] == eos_id :] for prompt in found]
    ends = [next((i for i, token in enumerate(prompt) if i and token == eos_id), len(prompt)) for prompt in found]
    return [prompt[:end] for prompt, end in zip(found, ends) if prompt]
