"""`minillm generate | import | export | merge`: what is done with a trained model."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from minillm.cli.conversation import conversing, template_for
from minillm.cli.verb import Verb
from minillm.config import Layer
from minillm.data.chat_templates import Message
from minillm.distributed.device import find_device
from minillm.files import free_directory
from minillm.generate.generate import generate, stream
from minillm.generate.params import SAMPLING_ONLY, SamplingParams
from minillm.generate.request import Completion, make_request
from minillm.hf import find_folder, is_hugging_face, is_peft
from minillm.load import (
    default_params,
    describe,
    export,
    export_hugging_face,
    export_peft,
    find_checkpoint,
    load,
)
from minillm.merge import merge, merge_peft
from minillm.trainer.config import DTYPES

PARAMETERS = [field.name for field in dataclasses.fields(SamplingParams)]


@dataclass(frozen=True, kw_only=True)
class Generate(SamplingParams):
    """Options of `generate`."""

    path: Annotated[str, "run directory, checkpoint, or folder"]
    prompt: Annotated[str, "text to continue, or what to answer"] = ""
    template: Annotated[str, "how it is given the prompt; auto: as it was taught, none: as text to continue"] = "auto"
    step: Annotated[int | None, "checkpoint of a run; none: the newest", ">= 0"] = None
    device: Annotated[str, "auto | cpu | cuda | mps | ..."] = "auto"
    dtype: Annotated[Literal["fp32", "fp16", "bf16"] | None, "of the weights (none: as they are)"] = None
    json: Annotated[bool, "print a JSON object for each completion: text, tokens, log-probabilities"] = False

    def __post_init__(self):
        super().__post_init__()
        if not self.json and (self.logprobs is not None or self.prompt_logprobs is not None):
            raise ValueError("logprobs, prompt_logprobs: a text has no place for them; give --json with them")


@dataclass(frozen=True)
class Export:
    """Options of `export`."""

    path: Annotated[str, "run directory, checkpoint, or folder"]
    out: Annotated[str, "folder to write"]
    format: Annotated[
        Literal["minillm", "hf", "peft"], "hf: as transformers reads it; peft: adapters alone, as peft reads them"
    ] = "minillm"
    dtype: Annotated[Literal["fp32", "fp16", "bf16"] | None, "of the weights (none: as they are)"] = None
    max_shard_size: Annotated[str | None, "hf: the largest file, such as 500MB (none: 5GB)"] = None
    step: Annotated[int | None, "checkpoint of a run; none: the newest", ">= 0"] = None
    quantize: Annotated[Literal["int8"] | None, "int8: a byte a weight, for inference alone (none: as they are)"] = None


@dataclass(frozen=True)
class Import:
    """Options of `import`."""

    path: Annotated[str, "Hugging Face folder, or a name on the hub; or adapters of peft's"]
    out: Annotated[str, "folder to write"]
    dtype: Annotated[Literal["fp32", "fp16", "bf16"] | None, "of the weights (none: as they are)"] = None
    base: Annotated[str | None, "the model that adapters belong to (none: that which they name)"] = None
    download: Annotated[bool, "fetch from the hub what its cache lacks"] = False


@dataclass(frozen=True)
class Merge:
    """Options of `merge`."""

    path: Annotated[str, "run directory or checkpoint, trained with lora.r"]
    out: Annotated[str, "folder to write"]
    dtype: Annotated[Literal["fp32", "fp16", "bf16"], "of the weights; they are summed in fp32"] = "fp32"
    step: Annotated[int | None, "checkpoint of a run; none: the newest", ">= 0"] = None
    base: Annotated[str | None, "the model that was trained on, if it was moved (none: where it was)"] = None


def params_of_folder(options: Any) -> Layer:
    """What the model's folder says of sampling from it, in its generation_config.json; `options` are a verb's."""
    params = default_params(options.path)
    names = [name for name in PARAMETERS if not (options.use_beam_search and name in SAMPLING_ONLY)]
    return Layer(options.path, {name: getattr(params, name) for name in names})


def generate_text(options: Generate) -> None:
    """Continue a prompt, or answer it: one completion a piece at a time, or several, one below the other."""
    folder = find_checkpoint(Path(options.path), options.step)
    config, tokenizer = describe(folder)
    if tokenizer is None:
        raise ValueError(f"{options.path}: there is no tokenizer beside the model, so it cannot read or write text")
    params = SamplingParams(**{name: getattr(options, name) for name in PARAMETERS})
    prompt: str | list[int] = options.prompt
    before = options.prompt  # what a completion is printed after; an answer stands alone
    if template := template_for(folder, options.template, tokenizer):
        prompt, stops = conversing(template)(tokenizer, [Message("user", options.prompt)])
        params = dataclasses.replace(params, stop_token_ids=(*params.stop_token_ids, *stops))
        before = ""
    request = make_request(config, tokenizer, prompt, params)  # a mistake is said before the weights are read
    model, tokenizer = load(folder, find_device(options.device), dtype=DTYPES.get(options.dtype))
    if not options.json and request.n_samples == 1 and not params.use_beam_search:
        print(before, end="", flush=True)
        for piece in stream(model, tokenizer, prompt, params):
            print(piece, end="", flush=True)
        print()
        return
    found = generate(model, tokenizer, prompt, params)
    for completion in found if params.n > 1 else [found]:
        print(as_json(options.prompt, completion) if options.json else before + completion.text)


def as_json(prompt: str, completion: Completion) -> str:
    """A completion on one line."""
    told = {"prompt": prompt, **dataclasses.asdict(completion), "cumulative_logprob": completion.cumulative_logprob}
    return json.dumps(told, ensure_ascii=False)


def export_model(options: Export) -> None:
    """Write a model with config and tokenizer, in our format or Hugging Face's."""
    out, dtype, size = free_directory(options.out), DTYPES.get(options.dtype), options.max_shard_size
    if options.format != "hf" and size is not None:
        raise ValueError("max_shard_size: only --format hf writes several files; give it, or leave this out")
    if options.format == "peft" and dtype is not None:
        raise ValueError("dtype: adapters are written as they are; leave it out")
    if options.quantize is not None and (options.format != "minillm" or dtype is not None):
        raise ValueError("quantize: int8 is of our own format, and a dtype itself; leave out --format and --dtype")
    if options.format == "hf":
        written = export_hugging_face(options.path, out, options.step, dtype, size or "5GB")
    elif options.format == "peft":
        written = export_peft(options.path, out, options.step)
    else:
        written = export(options.path, out, options.step, options.quantize, dtype)
    if options.format == "peft":
        print(f"{written}: adapters; peft.PeftModel.from_pretrained(their base, {options.out!r}) reads them")
        return
    print_size(written, options.out)


def import_model(options: Import) -> None:
    """Write a Hugging Face model in our own format; adapters of peft's merged into the model that they belong to."""
    folder = find_folder(options.path, options.download)
    if is_peft(folder):
        merged, difference = merge_peft(folder, free_directory(options.out), options.base, DTYPES.get(options.dtype))
        print_merged(merged, difference, options.out)
        return
    if options.base is not None:
        raise ValueError(f"base: {folder} holds no adapters of peft's; leave it out")
    if not is_hugging_face(folder):
        raise ValueError(f"{folder}: no Hugging Face folder: there is no config.json with a model_type in it")
    print_size(export(folder, free_directory(options.out), dtype=DTYPES.get(options.dtype)), options.out)


def merge_model(options: Merge) -> None:
    """Write a model with adapters as one of plain weights."""
    out = free_directory(options.out)
    written, difference = merge(options.path, out, options.step, options.base, DTYPES[options.dtype])
    print_merged(written, difference, options.out)


def print_merged(written: Path, difference: float, out: str) -> None:
    print(f"merged in fp32: with its adapters the model's logits are the same to {difference:.1e}")
    print_size(written, out)


def print_size(written: Path, out: str) -> None:
    size = sum(file.stat().st_size for file in written.iterdir())
    print(f"{written}: {size / 1e6:,.1f} MB; minillm.load({out!r}) reads it")


VERBS = {
    "generate": Verb(
        generate_text, Generate, ["path"], "RUN --prompt TEXT: continue a text", defaults=params_of_folder
    ),
    "import": Verb(import_model, Import, ["path", "out"], "DIR OUT: a Hugging Face model in our own format"),
    "merge": Verb(merge_model, Merge, ["path", "out"], "RUN OUT: a run with LoRA as one model of plain weights"),
    "export": Verb(
        export_model, Export, ["path", "out"], "RUN OUT [--format hf]: the model with config and tokenizer, as a folder"
    ),
}
