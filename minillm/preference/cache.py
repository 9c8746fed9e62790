"""Log-probabilities of a reference, computed once before training and kept beside the tokens that they are of.

    reference-0123456789abcdef/     named by what they were computed from
        index.json                  that, and the size and sha256 of each file
        train.npy  val.npy          float32 a token: log p of it, given what it follows; 0 where it is not learned

They depend on the weights, on the prepared data (which stands for template, tokenizer and text), and on the precision.
Where one of those is another than it was, so is the name, and they are computed anew; a folder that does not hold what
its name says is replaced.

T tokens a row.
"""

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn
from tqdm import tqdm

from minillm.data.loader import can_pin
from minillm.data.rows import PADDING, gather, plan_of
from minillm.data.store import Prepared, TokenStore
from minillm.data.writing import GrowingArray
from minillm.distributed.context import Context
from minillm.files import atomic_directory, explained, leftovers, read_json, sha256, temporary_for
from minillm.log import LOGGER
from minillm.preference.reference import looking, target_logprobs

FORMAT = "minillm reference 1"
PATIENCE = 3600.0  # seconds that ranks wait for rank 0 to put their shares together
STRIDE = 2**22  # tokens looked at together, so that putting parts together needs little memory
WORDS = {"weights": "other weights", "data": "other data or another template", "precision": "another precision"}


def cache_reference(
    model: nn.Module,
    prepared: Prepared,
    *,
    weights: str,
    precision: str,
    seq_len: int,
    rows: int,
    dist: Context,
    vocab_size: int | None = None,
) -> Path:
    """Give the stores of preferences the log-probabilities of a model, from the folder beside them or computed now.

    Args:
        model: as it is called in training, with the weights that it begins with. Autocast is the caller's.
        weights: the hash of these. precision: of the matrix products. rows: of T tokens, at a time.
        dist: each of the ranks computes its share; all see the folder of the data.

    Returns: the folder of what was computed. What stands there from another model, other data or another precision is
    not used, and one that is damaged is not, either; both are said. Raises ValueError where a row is shorter than a
    document.
    """
    made_from, path, stores = place(prepared, weights, precision)
    longest = max(int(np.diff(store.document_offsets).max()) for store in stores.values()) - 1
    if longest > seq_len:
        raise ValueError(f"data.seq_len: {seq_len} would cut preferences in two, of which one has {longest} places")
    problem = dist.broadcast(what_is_wrong(path, made_from, stores) if dist.is_main else None)
    if problem:
        if dist.is_main:
            LOGGER.info("reference: %s; computing log-probabilities of %s tokens", problem, total(stores))
            say_others(path)
        share = partial(write_share, model, seq_len=seq_len, rows=rows, dist=dist, vocab_size=vocab_size)
        compute(share, path, made_from, stores, dist)
    give(path, stores)
    return path


def open_reference(prepared: Prepared, *, weights: str, precision: str, dist: Context) -> bool:
    """Give the stores what `cache_reference` keeps, without the model; False, on all ranks, where it keeps nothing."""
    made_from, path, stores = place(prepared, weights, precision)
    kept = dist.broadcast(what_is_wrong(path, made_from, stores) is None if dist.is_main else None)
    if kept:
        give(path, stores)
    return kept


def place(prepared: Prepared, weights: str, precision: str) -> tuple[dict[str, str], Path, dict[str, TokenStore]]:
    """(what the log-probabilities are made from, the folder that is named by it, the stores that they are of)."""
    made_from = {"weights": weights, "data": prepared.info["hash"], "precision": precision}
    name = hashlib.sha256(json.dumps([FORMAT, made_from]).encode()).hexdigest()[:16]
    stores = {store.split: store for store in (prepared.train, prepared.val) if store is not None}
    return made_from, prepared.directory / f"reference-{name}", stores


def give(path: Path, stores: dict[str, TokenStore]) -> None:
    """Let the stores read what the folder holds."""
    for split, store in stores.items():
        store.give_reference(np.asarray(np.load(path / f"{split}.npy", mmap_mode="r")))


def total(stores: dict[str, TokenStore]) -> str:
    """How many tokens the stores have together, to be shown."""
    return f"{sum(store.n_tokens for store in stores.values()):,}"


# --- reading ----------------------------------------------------------------------------------------------------------


def what_is_wrong(path: Path, made_from: dict[str, str], stores: dict[str, TokenStore]) -> str | None:
    """Why a folder cannot be used; None where it can."""
    if not path.is_dir():
        return f"none is kept for this model and data{what_others_differ_in(path, made_from)}"
    try:
        index = read_json(path / "index.json")
        if index.get("format") != FORMAT or index.get("made_from") != made_from:
            return f"{path} is of {differences(index.get('made_from') or {}, made_from)}"
        for split, store in stores.items():
            entry, file = index["splits"][split], path / f"{split}.npy"
            if entry["n_tokens"] != store.n_tokens or sha256(file) != entry["sha256"]:
                return f"{file} is damaged"
    except (ValueError, KeyError, TypeError, OSError) as error:
        return f"{path} is damaged ({error})"
    return None


def what_others_differ_in(path: Path, made_from: dict[str, str]) -> str:
    """What is said of those that are kept beside it."""
    said = []
    for other in others(path):
        try:
            said.append(f"{other.name} is of {differences(read_json(other / 'index.json')['made_from'], made_from)}")
        except (ValueError, KeyError, TypeError):
            said.append(f"{other.name} is damaged")
    return f" ({'; '.join(said)})" if said else ""


def others(path: Path) -> list[Path]:
    """What is kept beside it of other models, or in another precision."""
    return sorted(other for other in path.parent.glob("reference-*") if other != path)


def say_others(path: Path) -> None:
    """Say what could be deleted: nobody knows here whether another run is to go on with it."""
    if kept := others(path):
        words = f"{sum(map(size, kept)):,}", " ".join(shlex.quote(str(other)) for other in kept)
        LOGGER.info(
            "reference: %s bytes made for other runs are beside it; when none of these is to go on: rm -r %s", *words
        )


def size(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir())


def differences(found: dict[str, str], expected: dict[str, str]) -> str:
    """In words, by what one was made from and the other not."""
    names = [WORDS[name] for name, value in expected.items() if found.get(name) != value]
    return ", ".join(names) or "another format"


# --- computing --------------------------------------------------------------------------------------------------------


def compute(
    share: Callable[[TokenStore, Path], None],
    path: Path,
    made_from: dict[str, str],
    stores: dict[str, TokenStore],
    dist: Context,
) -> None:
    """Compute what is missing, on all ranks, and commit it: each writes its share, and rank 0 adds them up."""
    parts = path.with_name(f"{path.name}.parts")
    if dist.is_main:
        for old in leftovers(parts):
            shutil.rmtree(old, ignore_errors=True)
    parts = Path(dist.broadcast(str(temporary_for(parts))))
    try:
        with explained(parts):
            parts.mkdir(parents=True, exist_ok=True)
            for split, store in stores.items():
                share(store, parts / f"{split}-{dist.dp_rank}.npy")
        dist.at("reference: putting the ranks' shares together", patience=PATIENCE)
        dist.barrier()
        if dist.is_main:
            put_together(parts, path, made_from, stores)
        dist.barrier()
    finally:
        if dist.is_main:
            shutil.rmtree(parts, ignore_errors=True)


def write_share(
    model: nn.Module, store: TokenStore, file: Path, *, seq_len: int, rows: int, dist: Context, vocab_size: int | None
) -> None:
    """Write the log-probabilities of every dp_size-th row of a store to a file that has places for all."""
    plan, pinned = plan_of(store, seq_len), can_pin(dist.device)
    writes = dist.tp_rank == 0  # the others of its axis compute the same
    with (
        looking(model),
        Places(file, store.n_tokens) if writes else nullcontext() as out,
        tqdm(total=plan.n_rows, desc="reference", disable=None if dist.is_main else True) as bar,
    ):
        for first in range(0, plan.n_rows, rows * dist.dp_size):
            dist.at("reference: computing log-probabilities")
            here = range(first, min(plan.n_rows, first + rows * dist.dp_size))
            spans = [plan.pieces(row) for row in here[dist.dp_rank :: dist.dp_size]]
            padded = spans + [PADDING] * (-(-len(here) // dist.dp_size) - len(spans))  # all ranks as many rows
            batch = gather([(store, span) for span in padded], seq_len, packed=True, pinned=pinned)
            logprobs = target_logprobs(model, batch.to(dist.device), vocab_size).float().cpu().numpy()
            for row, (starts, lengths) in zip(logprobs, spans if writes else ()):
                column = 0
                for start, length in zip(starts, lengths):  # the target of each input is the token after it
                    out.write(start + 1, row[column : column + length])
                    column += length
            bar.update(len(here))


class Places:
    """An .npy file of zeros, which take no room until they are written over.

    Not a memory map: where a disk is full, writing to that kills the process without a word.
    """

    def __init__(self, path: Path, length: int):
        np.lib.format.open_memmap(path, "w+", np.float32, (length,))
        self.file = open(path, "r+b")  # noqa: SIM115 (closed in __exit__)
        self.begin = self.file.seek(0, os.SEEK_END) - 4 * length

    def write(self, place: int, values: np.ndarray) -> None:
        self.file.seek(self.begin + 4 * place)
        self.file.write(values.tobytes())

    def __enter__(self) -> "Places":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def put_together(parts: Path, path: Path, made_from: dict[str, str], stores: dict[str, TokenStore]) -> None:
    """Add up the files of the ranks, of which each place is filled by one and 0 in all others, and commit the sum."""
    splits = {}
    with atomic_directory(path) as folder:
        for split, store in stores.items():
            shares = [np.load(file, mmap_mode="r") for file in sorted(parts.glob(f"{split}-*.npy"))]
            out = GrowingArray(folder / f"{split}.npy", np.float32)
            for start in range(0, store.n_tokens, STRIDE):
                out.append(sum(share[start : start + STRIDE] for share in shares))
            splits[split] = {"n_tokens": store.n_tokens, "sha256": out.close()["sha256"]}
        index = {"format": FORMAT, "made_from": made_from, "splits": splits}
        (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
