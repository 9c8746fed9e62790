"""`minillm eval`: how well a trained model predicts a text."""

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from minillm.cli.verb import Verb
from minillm.config import shown
from minillm.distributed.device import best_precision, find_device
from minillm.eval.text import EvalTextConfig, evaluate_text, text_files
from minillm.load import find_checkpoint, load, trained_seq_len, weight_hashes
from minillm.log import memory_explained
from minillm.trainer import DTYPES

LESS_MEMORY = "to evaluate in less, lower micro_batch_size, or data.seq_len"


@dataclass(frozen=True)
class Eval:
    """Options of `eval`."""

    path: Annotated[str, "run directory, checkpoint, or folder"]
    data: EvalTextConfig = field(default_factory=EvalTextConfig)
    step: Annotated[int | None, "checkpoint of a run; none: the newest", ">= 0"] = None
    device: Annotated[str, "auto | cpu | cuda | mps | ..."] = "auto"
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], "auto: bf16 where the device is fast at it"] = "auto"
    micro_batch_size: Annotated[int | None, "rows a forward; none: as many as fit well", ">= 1"] = None
    json: Annotated[bool, "print one JSON object, without rounding"] = False


def evaluate_run(options: Eval) -> None:
    """Print how well a model predicts a text, of what weights and under what settings."""
    files = text_files(options.data)  # a misspelt one is said before a large model is read
    device = find_device(options.device)
    precision = best_precision(device) if options.precision == "auto" else options.precision
    folder = find_checkpoint(Path(options.path), options.step)  # a run that goes on there may save a newer one now
    model, tokenizer = load(folder, device=device)
    if precision == "fp32":
        model.float()
    seq_len = options.data.seq_len or trained_seq_len(folder) or model.config.max_seq_len
    data = replace(options.data, seq_len=seq_len)
    autocast = nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])
    with memory_explained(lambda: LESS_MEMORY), autocast:
        figures = evaluate_text(model, tokenizer, data, options.micro_batch_size)
    settings = {name: value for name, value in asdict(data).items() if name not in ("path", "workers")}
    result = figures | {
        "model": str(folder),
        "weights": weight_hashes(folder),
        "tokenizer_hash": tokenizer.hash,
        "files": [str(file) for file in files],
        "settings": settings | {"precision": precision, "device": device.type},
    }
    print(json.dumps(result) if options.json else report(result))


def report(result: dict[str, Any]) -> str:
    """The result for a person: one fact a line."""
    files, weights = result["files"], list(result["weights"].items())
    facts = {
        "loss": f"{result['val_loss']:.4f} nats a token",
        "perplexity": f"{result['perplexity']:,.3f}",
        "bits per byte": f"{result['val_bpb']:.4f}",
        "accuracy": f"{result['val_accuracy']:.2%} of the tokens were the most likely",
        "text": f"{result['tokens']:,} tokens, {result['bytes']:,} bytes, documents: {result['documents']:,}",
        "files": f"{files[0]}{more(files)}",
        "settings": ", ".join(f"{name} {shown(value)}" for name, value in result["settings"].items()),
        "tokenizer": f"hash {result['tokenizer_hash']}",
        "model": result["model"],
        "weights": f"{weights[0][0]}, sha256 {weights[0][1]}{more(weights)}",
    }
    return "\n".join(f"{name:<15} {fact}" for name, fact in facts.items())


def more(items: list) -> str:
    """What stands behind the first of several."""
    return f" and {len(items) - 1} more" if len(items) > 1 else ""


VERBS = {"eval": Verb(evaluate_run, Eval, ["path"], "RUN --data.path TEXT: perplexity, bits per byte and accuracy")}
