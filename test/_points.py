"""A point that moves in the plane, as a world model that planners know exactly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from _models import SpecEnv
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torchrl.data import TensorSpec

from torchrl_wm import WorldModel, WorldModelEnv
from torchrl_wm.modules.keys import join

#: How far a step leads at most.
STEP = 0.1
SMALL = {"planning_horizon": 3, "optim_steps": 2, "num_candidates": 12, "top_k": 3}


class Move(nn.Module):
    """Moves the point by the action."""

    def forward(self, point: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return point + STEP * action


def point_env(
    *,
    latent: NestedKey = "latent",
    observation: NestedKey = "observation",
    action: NestedKey = "action",
    done: Callable | None = None,
    reward: Callable | None = None,
    action_spec: TensorSpec | None = None,
    move: nn.Module | None = None,
    **kwargs,
) -> WorldModelEnv:
    """An env of the point, seen at twice its place; by default the reward is its first coordinate.

    Args:
        done: where an episode ends, bool ``[*B, 1]`` from the next point.
        reward: the reward ``[*B, 1]`` from the next point.
    """
    after = join("next", latent)
    head = None if done is None else Mod(done, [after], [("next", "terminated")])
    model = WorldModel(
        Mod(Half(), [observation], [latent]),
        Mod(move or Move(), [latent, action], [after]),
        Mod(reward or (lambda x: x[..., :1].clone()), [after], [("next", "reward")]),
        done_head=head,
    )
    real = SpecEnv(
        observation=2,
        observation_key=observation,
        action_key=action,
        action_spec=action_spec,
    )
    return WorldModelEnv(model, real, **kwargs)


class Half(nn.Module):
    """An encoder that counts its calls."""

    calls = 0

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return observation / 2


def points(*size: int, **entries: torch.Tensor) -> TensorDict:
    """Points at the origin, ``[*B]``, with other entries beside them."""
    return TensorDict({"latent": torch.zeros(*size, 2), **entries}, size)
