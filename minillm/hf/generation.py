"""generation_config.json: the tokens that end a completion, and how its makers would sample from a model."""

import logging
from pathlib import Path
from typing import Any

from minillm.files import read_json
from minillm.hf.config import is_hugging_face

logger = logging.getLogger("minillm")

GENERATION = "generation_config.json"
SAMPLING = ("temperature", "top_k", "top_p", "min_p")  # these, and the next, are called the same here
FOLLOWED = (*SAMPLING, "repetition_penalty", "do_sample", "eos_token_id")
# What comes from elsewhere here (the tokenizer, the prompt and the context), what transformers returns or keeps beside
# the text, or says where the file is from.
WITHOUT_EFFECT = (
    *("bos_token_id", "pad_token_id", "max_length", "max_new_tokens", "transformers_version"),
    *("use_cache", "output_attentions", "output_hidden_states", "output_scores", "return_dict_in_generate"),
)
# What changes nothing at this value, by which transformers means that it is off: its own default.
NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("typical_p", "top_h", "length_penalty", "encoder_repetition_penalty", "guidance_scale"), 1.0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "diversity_penalty", "min_length", "min_new_tokens"), 0),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("early_stopping", "remove_invalid_values", "renormalize_logits", "token_healing"), False),
    **dict.fromkeys(("output_logits", "low_memory", "use_mtp"), False),
}


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The fields of SamplingParams that a folder sets; {} where it has no such file. Others are named in a warning.

    eos_token_id may be a list, of which each ends a completion. A do_sample of false is temperature 0.
    """
    path = folder / GENERATION
    if path.exists():
        given = {key: value for key, value in read_json(path).items() if value is not None}
    elif is_hugging_face(folder):  # where there is no such file, transformers takes these tokens from config.json
        given = {"eos_token_id": read_json(folder / "config.json").get("eos_token_id")}
    else:
        given = {}
    known = (*FOLLOWED, *WITHOUT_EFFECT)
    others = {key for key in given if key not in known and not key.startswith("_")}
    if others := sorted(key for key in others if key not in NEUTRAL or given[key] != NEUTRAL[key]):
        logger.warning("%s: not followed: %s", path, ", ".join(others))
    fields = {name: given[name] for name in (*SAMPLING, "repetition_penalty") if name in given}
    if fields.get("top_k") == 0:
        fields["top_k"] = -1  # all of them
    if given.get("do_sample") is False:
        fields = {name: value for name, value in fields.items() if name not in SAMPLING} | {"temperature": 0.0}
    ends = given.get("eos_token_id")
    if ends is not None:
        fields["stop_token_ids"] = tuple(ends) if isinstance(ends, list) else (ends,)
    return fields
