"""World models for TorchRL: compose one, train it, imagine with it, plan through it.

The classes used most are importable from here; each also lives in the folder
its subject belongs to (:mod:`torchrl_wm.modules`, :mod:`torchrl_wm.envs`,
:mod:`torchrl_wm.objectives`, ...).
"""

from __future__ import annotations

import importlib
from typing import Any, TYPE_CHECKING

import gymnasium

if TYPE_CHECKING:
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

#: The packages that define them. They are imported on first use: importing torch takes
#: seconds, and the help of the command line does not need it.
_HOMES = {
    "GymWorldModelEnv": "export",
    "GymWorldModelVectorEnv": "export",
    "WorldModel": "modules",
    "WorldModelEnv": "envs",
    "WorldModelLoss": "objectives",
    "make_env": "export",
    "make_world_model_env": "export",
}
_PACKAGES = frozenset(
    {
        "cli",
        "diagnostics",
        "envs",
        "export",
        "models",
        "modules",
        "objectives",
        "planners",
        "trainers",
    }
)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
        value = globals()[name] = getattr(home, name)
        return value
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})


# By name, so that they are imported when an env is made.
gymnasium.register(
    "torchrl_wm/ContinuousCartPole-v0",
    "torchrl_wm.trainers.cartpole:ContinuousCartPoleEnv",
    max_episode_steps=200,
)
gymnasium.register(
    "torchrl_wm/WorldModel-v0",
    "torchrl_wm.export.gym_env:GymWorldModelEnv",
    vector_entry_point="torchrl_wm.export.vector_env:GymWorldModelVectorEnv",
)
