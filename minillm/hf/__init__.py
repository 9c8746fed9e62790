"""Folders of the Hugging Face hub, in both directions: what a model is, and its weights.

families.py has a table for each kind of model; config.py translates config.json by it, weights.py reads the tensors and
export.py writes them; peft.py does both for adapters. generation.py reads how to sample from a model, and hub.py finds
a folder by its name on the hub.
Hugging Face's names stand in this package and nowhere else.
"""

from minillm.hf.config import is_hugging_face, read_config
from minillm.hf.export import copy_generation_config, write
from minillm.hf.generation import GENERATION, read_generation_config
from minillm.hf.hub import find_folder
from minillm.hf.peft import is_peft, load_peft, peft_base, save_peft
from minillm.hf.weights import blocks, describe, fill, find_sources, weight_files

__all__ = [
    "GENERATION",
    "blocks",
    "copy_generation_config",
    "describe",
    "fill",
    "find_folder",
    "find_sources",
    "is_hugging_face",
    "is_peft",
    "load_peft",
    "peft_base",
    "read_config",
    "read_generation_config",
    "save_peft",
    "weight_files",
    "write",
]
