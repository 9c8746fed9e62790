"""Train language models from scratch in pure PyTorch."""

from minillm.generate.engine import Engine, generate, stream
from minillm.generate.params import SamplingParams
from minillm.generate.request import Completion
from minillm.load import default_params, load, save
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from minillm.trainer import TrainConfig, Trainer

__all__ = [
    "Completion",
    "Engine",
    "ModelConfig",
    "SamplingParams",
    "Tokenizer",
    "TrainConfig",
    "Trainer",
    "Transformer",
    "default_params",
    "generate",
    "load",
    "load_tokenizer",
    "save",
    "stream",
    "train_tokenizer",
]
