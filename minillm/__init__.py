"""Train language models from scratch in pure PyTorch."""

from minillm.generate.engine import Engine
from minillm.generate.generate import generate, stream
from minillm.generate.params import SamplingParams
from minillm.generate.request import Completion
from minillm.load import default_params, load, save
from minillm.lora import LoRAConfig, apply_lora, merge_lora
from minillm.losses import dpo_loss
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from minillm.trainer import TrainConfig, Trainer

__all__ = [
    "Completion",
    "Engine",
    "LoRAConfig",
    "ModelConfig",
    "SamplingParams",
    "Tokenizer",
    "TrainConfig",
    "Trainer",
    "Transformer",
    "apply_lora",
    "default_params",
    "dpo_loss",
    "generate",
    "load",
    "load_tokenizer",
    "merge_lora",
    "save",
    "stream",
    "train_tokenizer",
]
