"""A model and its tokenizer, from a run, a checkpoint, a saved folder or one of Hugging Face's; and saved to one."""

from minillm.load.find import (
    Adapters,
    adapters_in,
    default_params,
    describe,
    find_checkpoint,
    taught_template,
    tokenizer_home,
    trained_seq_len,
    weight_hashes,
    weights_hash,
)
from minillm.load.save import (
    check_same,
    check_same_logits,
    export,
    export_hugging_face,
    export_peft,
    new_home,
    save,
    some_tokens,
)
from minillm.load.stored import in_memory, load, load_base, load_weights, open_stored, open_whole

__all__ = [
    "Adapters",
    "adapters_in",
    "check_same",
    "check_same_logits",
    "default_params",
    "describe",
    "export",
    "export_hugging_face",
    "export_peft",
    "find_checkpoint",
    "in_memory",
    "load",
    "load_base",
    "load_weights",
    "new_home",
    "open_stored",
    "open_whole",
    "save",
    "some_tokens",
    "taught_template",
    "tokenizer_home",
    "trained_seq_len",
    "weight_hashes",
    "weights_hash",
]
