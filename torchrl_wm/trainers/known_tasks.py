"""Reward and termination functions of well-known tasks, for PETS and MBPO.

Each is ``f(observation, action, next_observation)`` on ``[*B, ...]`` and returns ``[*B]``, as the
Gymnasium env of that name computes it.
"""

from __future__ import annotations

from collections.abc import Callable
from math import pi

import torch

from torchrl_wm._registry import load_object

#: ``f(observation, action, next_observation)``.
Function = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def pendulum_reward(
    observation: torch.Tensor, action: torch.Tensor, next_observation: torch.Tensor
) -> torch.Tensor:
    """Return the reward of Pendulum-v1: the cost of angle, velocity and torque *before* the step."""
    cos, sin, velocity = observation.unbind(-1)
    angle = torch.atan2(sin, cos)
    torque = action[..., 0].clamp(-2, 2)
    return -(angle.square() + 0.1 * velocity.square() + 0.001 * torque.square())


def cartpole_reward(
    observation: torch.Tensor, action: torch.Tensor, next_observation: torch.Tensor
) -> torch.Tensor:
    """Return the reward of CartPole: 1 for each step, the last one included."""
    return torch.ones_like(observation[..., 0])


def cartpole_termination(
    observation: torch.Tensor, action: torch.Tensor, next_observation: torch.Tensor
) -> torch.Tensor:
    """Return whether CartPole ends: the cart left the track, or the pole leans by more than 12 degrees."""
    position, angle = next_observation[..., 0], next_observation[..., 2]
    return (position.abs() > 2.4) | (angle.abs() > 12 * 2 * pi / 360)


def inverted_pendulum_reward(
    observation: torch.Tensor, action: torch.Tensor, next_observation: torch.Tensor
) -> torch.Tensor:
    """Return the reward of InvertedPendulum-v5: 1 for each step at which the pole stays up."""
    ended = inverted_pendulum_termination(observation, action, next_observation)
    return (~ended).to(observation.dtype)


def inverted_pendulum_termination(
    observation: torch.Tensor, action: torch.Tensor, next_observation: torch.Tensor
) -> torch.Tensor:
    """Return whether InvertedPendulum-v5 ends: it leans by more than 0.2 rad, or is not finite."""
    finite = next_observation.isfinite().all(-1)
    return ~finite | (next_observation[..., 1].abs() > 0.2)


def hopper_termination(
    observation: torch.Tensor, action: torch.Tensor, next_observation: torch.Tensor
) -> torch.Tensor:
    """Return whether Hopper-v5 ends: too low, leaning too far, or a state out of range."""
    height, angle = next_observation[..., 0], next_observation[..., 1]
    in_range = (next_observation[..., 1:].abs() < 100).all(-1)
    finite = next_observation.isfinite().all(-1)
    return ~(finite & in_range & (height > 0.7) & (angle.abs() < 0.2))


#: By the names that configs use.
REWARDS: dict[str, Function] = {
    "pendulum": pendulum_reward,
    "cartpole": cartpole_reward,
    "inverted_pendulum": inverted_pendulum_reward,
}
TERMINATIONS: dict[str, Function] = {
    "cartpole": cartpole_termination,
    "inverted_pendulum": inverted_pendulum_termination,
    "hopper": hopper_termination,
}


def find_function(
    name: str | Function, known: dict[str, Function], what: str, words: tuple[str, ...]
) -> Function | None:
    """Return the function that a config names; None for one of the ``words``, such as "learned".

    Raises:
        ValueError: if there is none of that name.
    """
    if callable(name):
        return name
    if name in words:
        return None
    if name in known:
        return known[name]
    if ":" in name:
        return load_object(name)
    raise ValueError(
        f"Unknown {what} {name!r}. Valid choices are {list(words)}, the functions {sorted(known)}, "
        f"or 'module:function' for your own function."
    )
