"""Folders of the Hugging Face hub, in both directions: what a model is, and its weights.

families.py has a table for each kind of model; config.py translates config.json by it, and weights.py the tensors;
hub.py finds a folder by its name on the hub.
Hugging Face's names stand in this package and nowhere else.
"""

from minillm.hf.config import is_hugging_face, read_config
from minillm.hf.weights import blocks, describe, fill, find_sources, weight_files

__all__ = ["blocks", "describe", "fill", "find_sources", "is_hugging_face", "read_config", "weight_files"]
