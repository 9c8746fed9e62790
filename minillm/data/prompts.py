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
    if store.n_documents >= count:
        starts = [int(store.document_offsets[i * store.n_documents // count]) for i in range(count)]
    else:
        starts = [i * store.n_tokens // count for i in range(count)]
    found = [store.tokens(start, min(start + length, store.n_tokens)).tolist() for start in starts]
    after_eos = [prompt[prompt[0] == eos_id :] for prompt in found]  # in the middle of a text any token may come first
    inside_one = [prompt[: prompt.index(eos_id)] if eos_id in prompt else prompt for prompt in after_eos]
    return [prompt for prompt in inside_one if prompt]
