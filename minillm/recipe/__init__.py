"""What the scripts share: how a configuration comes about, how a run starts, and how its trainer is wired."""

from minillm.recipe.config import RecipeConfig
from minillm.recipe.fitting import fitting
from minillm.recipe.layers import earlier, other_shape, read_config, read_layers
from minillm.recipe.start import begin, open_text, opened, starting_point
from minillm.recipe.wiring import Settled, build_model, make_evaluation, make_trainer, settle

__all__ = [
    "RecipeConfig",
    "Settled",
    "begin",
    "build_model",
    "earlier",
    "fitting",
    "make_evaluation",
    "make_trainer",
    "open_text",
    "opened",
    "other_shape",
    "read_config",
    "read_layers",
    "settle",
    "starting_point",
]
