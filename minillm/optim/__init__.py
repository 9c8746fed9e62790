"""The optimizer: which parameters decay, who updates them, the learning rate of each step, the gradient's limit."""

from minillm.optim.build import OPTIMIZERS, build_optimizer
from minillm.optim.config import OptimConfig
from minillm.optim.gradients import clip_grad_norm_, gradient_norms, unscale_
from minillm.optim.groups import param_groups, unmatched_patterns
from minillm.optim.lamb import Lamb
from minillm.optim.muon import Muon
from minillm.optim.schedule import lr_at, warmup_steps
from minillm.optim.sharded import parts, whole_norms
from minillm.optim.state import optimizer_tensors

__all__ = [
    "OPTIMIZERS",
    "Lamb",
    "Muon",
    "OptimConfig",
    "build_optimizer",
    "clip_grad_norm_",
    "gradient_norms",
    "lr_at",
    "optimizer_tensors",
    "param_groups",
    "parts",
    "unmatched_patterns",
    "unscale_",
    "warmup_steps",
    "whole_norms",
]
