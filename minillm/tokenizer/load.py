"""Reading a saved tokenizer of any kind, and saying what it is."""

from pathlib import Path

from minillm.files import read_json, sha256
from minillm.tokenizer.hf import is_hugging_face, read_hugging_face
from minillm.tokenizer.kinds import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer, definition_hash


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of the folder it is in, a run, or a checkpoint of a run.

    Raises ValueError naming the file that is missing, damaged, or of a kind this version does not know.
    """
    folder = Path(path).absolute()
    if folder.is_file() and folder.name != "tokenizer.json":
        raise ValueError(f"{path}: is no tokenizer.json; give one, or the folder of a tokenizer, a run or a checkpoint")
    folder = folder.parent if folder.is_file() else folder
    if not (folder / "tokenizer.json").exists() and folder.parent.name == "checkpoints":
        folder = folder.parent.parent
    description, model = folder / "tokenizer.json", folder / "tokenizer.model"
    if not description.exists():
        raise ValueError(f"{path}: no tokenizer.json there; give the folder of a tokenizer, a run or a checkpoint")
    definition = read_json(description)
    if is_hugging_face(definition):
        return read_hugging_face(description)
    if definition.pop("hash", None) != definition_hash(definition):
        raise ValueError(f"{description}: damaged or edited: its hash does not fit its content")
    match definition["kind"]:
        case "char":
            return CharTokenizer(definition["characters"], definition["special_tokens"])
        case "byte":
            return ByteTokenizer(definition["special_tokens"])
        case "bpe":
            if not model.exists():
                raise ValueError(f"{model}: missing; the tokenizer.json beside it needs it")
            if sha256(model) != definition["model_sha256"]:
                raise ValueError(f"{model}: damaged, or not the one that the tokenizer.json beside it was saved with")
            return BPETokenizer(model.read_bytes())
        case kind:
            raise ValueError(f"{description}: kind {kind!r} is unknown; this version reads bpe, char, byte and hf")


def describe(tokenizer: Tokenizer) -> str:
    """Lines for a person: kind, size, hash and special tokens. How well it packs a text is for `measure`."""
    marks = {"begins": tokenizer.bos_id, "ends": tokenizer.eos_id, "pads": tokenizer.pad_id}
    facts = {
        "kind": tokenizer.kind,
        "vocabulary": f"{tokenizer.vocab_size:,} ids",
        "hash": tokenizer.hash,
        "special tokens": "  ".join(f"{id} {name}" for name, id in tokenizer.special_tokens.items()),
        "a document": "  ".join(f"{does} with {'nothing' if id is None else id}" for does, id in marks.items()),
    }
    return "\n".join(f"{name:<15} {fact}" for name, fact in facts.items())
