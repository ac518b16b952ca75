"""Checks of the arguments that the single and the vector env have in common."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import numpy as np

from torchrl_wm._checks import positive_int


def checked_limit(limit: Any) -> int | None:
    """Return a number of steps after which episodes are truncated, or None."""
    if limit is None:
        return None
    return positive_int("max_episode_steps", limit, ", or None for no limit")


def checked_options(options: Any) -> dict[str, Any]:
    """Return a copy of the options of a reset; an empty one for None."""
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(
            f"options must be a dictionary, such as {{'observation': observation}}, or None, got "
            f"{options!r:.80}."
        )
    return dict(options or {})


def checked_seed(seed: Any) -> int | None:
    """Return a seed that Gymnasium takes, or None."""
    is_seed = isinstance(seed, Integral) and not isinstance(seed, bool) and seed >= 0
    if seed is not None and not is_seed:
        raise ValueError(f"seed must be an int of at least 0, or None, got {seed!r}.")
    return None if seed is None else int(seed)


def checked_render_mode(mode: Any, metadata: dict[str, Any]) -> str | None:
    """Return a render mode that the env has, or None."""
    modes = metadata["render_modes"]
    if mode is not None and mode not in modes:
        raise ValueError(
            f"render_mode must be one of {modes} or None, got {mode!r}. To watch on a screen: "
            f"gymnasium.wrappers.HumanRendering(env) over 'rgb_array'."
        )
    return mode


def draw_seeds(np_random: np.random.Generator) -> tuple[int, int]:
    """Draw seeds for a reset and for torch's random numbers in the episode."""
    first, second = np_random.integers(0, 2**31 - 1, size=2)
    return int(first), int(second)
