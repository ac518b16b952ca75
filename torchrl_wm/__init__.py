"""World models for TorchRL: compose one, train it, imagine with it, plan through it.

The classes used most are importable from here; each also lives in the folder
its subject belongs to (:mod:`torchrl_wm.modules`, :mod:`torchrl_wm.envs`,
:mod:`torchrl_wm.objectives`, ...).
"""

from __future__ import annotations

import gymnasium

from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.export import (
    GymWorldModelEnv,
    GymWorldModelVectorEnv,
    make_env,
    make_world_model_env,
)
from torchrl_wm.modules import WorldModel
from torchrl_wm.objectives import WorldModelLoss

__version__ = "0.1.0"

__all__ = [
    "GymWorldModelEnv",
    "GymWorldModelVectorEnv",
    "WorldModel",
    "WorldModelEnv",
    "WorldModelLoss",
    "make_env",
    "make_world_model_env",
]

# By name, so that it is imported where somebody makes one.
gymnasium.register(
    "torchrl_wm/ContinuousCartPole-v0",
    "torchrl_wm.trainers.cartpole:ContinuousCartPoleEnv",
    max_episode_steps=200,
)
