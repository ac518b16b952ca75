"""The recipes that come with the package, one algorithm in each file."""

from __future__ import annotations

from torchrl_wm.trainers.recipes.dreamer import Dreamer, DreamerConfig
from torchrl_wm.trainers.recipes.mbpo import MBPO, MBPOConfig
from torchrl_wm.trainers.recipes.model import ModelConfig, ModelRecipe
from torchrl_wm.trainers.recipes.mopo import MOPO, MOPOConfig
from torchrl_wm.trainers.recipes.pets import PETS, PETSConfig
from torchrl_wm.trainers.recipes.planet import PlaNet, PlaNetConfig
from torchrl_wm.trainers.recipes.tdmpc2 import TDMPC2, TDMPC2Config

__all__ = [
    "Dreamer",
    "DreamerConfig",
    "MBPO",
    "MBPOConfig",
    "MOPO",
    "MOPOConfig",
    "ModelConfig",
    "ModelRecipe",
    "PETS",
    "PETSConfig",
    "PlaNet",
    "PlaNetConfig",
    "TDMPC2",
    "TDMPC2Config",
]
