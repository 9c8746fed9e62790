"""`minillm generate | export`: what is done with a trained model."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from minillm.cli.verb import Verb
from minillm.distributed.device import find_device
from minillm.files import free_directory
from minillm.generate.engine import stream
from minillm.generate.params import SamplingParams
from minillm.load import export, load


@dataclass(frozen=True, kw_only=True)
class Generate(SamplingParams):
    """Options of `generate`."""

    path: Annotated[str, "run directory, checkpoint, or folder"]
    prompt: Annotated[str, "text to continue"] = ""
    step: Annotated[int | None, "checkpoint of a run; none: the newest", ">= 0"] = None
    device: Annotated[str, "auto | cpu | cuda | mps | ..."] = "auto"


@dataclass(frozen=True)
class Export:
    """Options of `export`."""

    path: Annotated[str, "run directory or checkpoint"]
    out: Annotated[str, "folder to write"]
    step: Annotated[int | None, "checkpoint of a run; none: the newest", ">= 0"] = None
    quantize: Annotated[Literal["int8"] | None, "int8: a byte a weight, for inference alone (none: as they are)"] = None


def generate_text(options: Generate) -> None:
    """Continue a prompt, a piece at a time."""
    model, tokenizer = load(options.path, device=find_device(options.device), step=options.step)
    if tokenizer is None:
        raise ValueError(f"{options.path}: there is no tokenizer beside the model, so it cannot read or write text")
    params = SamplingParams(**{f.name: getattr(options, f.name) for f in dataclasses.fields(SamplingParams)})
    print(options.prompt, end="", flush=True)
    for piece in stream(model, tokenizer, options.prompt, params):
        print(piece, end="", flush=True)
    print()


def export_model(options: Export) -> None:
    """Write the model of a run as one file, with config and tokenizer."""
    out = export(options.path, free_directory(options.out), options.step, options.quantize)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {size / 1e6:,.1f} MB; minillm.load({str(options.out)!r}) reads it")


VERBS = {
    "generate": Verb(generate_text, Generate, ["path"], "RUN --prompt TEXT: continue a text"),
    "export": Verb(export_model, Export, ["path", "out"], "RUN OUT: the model as one file, with config and tokenizer"),
}
