"""Gymnasium envs of any world model, for other libraries to act in."""

from __future__ import annotations

from typing import Any

from torchrl_wm.export.gym_env import GymWorldModelEnv
from torchrl_wm.export.make import make_env, make_world_model_env
from torchrl_wm.export.vector_env import GymWorldModelVectorEnv

__all__ = [
    "GymWorldModelEnv",
    "GymWorldModelVectorEnv",
    "SB3VecEnv",
    "make_env",
    "make_world_model_env",
]


def __getattr__(name: str) -> Any:
    # Stable-Baselines3 is optional, and slow to import.
    if name == "SB3VecEnv":
        from torchrl_wm.export.sb3 import SB3VecEnv

        return SB3VecEnv
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
