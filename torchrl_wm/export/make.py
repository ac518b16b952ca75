"""Factories of imagined Gymnasium envs."""

from __future__ import annotations

from typing import Any

from torchrl_wm.export.gym_env import GymWorldModelEnv
from torchrl_wm.export.vector_env import GymWorldModelVectorEnv

#: The names of the backend of :func:`make_env`, in lower case.
WORLD_MODEL_BACKENDS = ("world-model", "world_model", "model", "wm")


def make_world_model_env(
    model: Any, *, num_envs: int | None = None, **kwargs: Any
) -> GymWorldModelEnv | GymWorldModelVectorEnv:
    """Make a Gymnasium env of a world model.

    Args:
        model: see :class:`~torchrl_wm.GymWorldModelEnv`.

    Keyword Args:
        num_envs: the number of envs of a :class:`~torchrl_wm.GymWorldModelVectorEnv`; None
            for a :class:`~torchrl_wm.GymWorldModelEnv`.
        kwargs: the other arguments of that class.

    Returns:
        The env.

    Raises:
        TypeError, ValueError: as :class:`~torchrl_wm.GymWorldModelEnv`.

    Examples:
        >>> import numpy as np
        >>> from gymnasium.spaces import Box
        >>> from torchrl_wm import make_world_model_env
        >>> class Model:
        ...     def reset(self):
        ...         return np.zeros(1, np.float32)
        ...     def step(self, state, action):
        ...         return state + 1, state + 1, 1.0
        >>> env = make_world_model_env(
        ...     Model(), observation_space=Box(0, 100, (1,)), action_space=Box(-1, 1, (1,))
        ... )
        >>> env.reset(seed=0)[0], env.step(np.zeros(1))[0]
        (array([0.], dtype=float32), array([1.], dtype=float32))
    """
    if num_envs is not None:
        return GymWorldModelVectorEnv(model, num_envs=num_envs, **kwargs)
    return GymWorldModelEnv(model, **kwargs)


def make_env(
    model: Any, backend: str = "world-model", **kwargs: Any
) -> GymWorldModelEnv | GymWorldModelVectorEnv:
    """Make an env by the name of a backend, with :func:`make_world_model_env`.

    Args:
        model: see :class:`~torchrl_wm.GymWorldModelEnv`.
        backend: ``"world-model"``, or one of its other names ``world_model``, ``model``
            and ``wm``, in upper or lower case.

    Keyword Args:
        kwargs: the other arguments of :func:`make_world_model_env`.

    Returns:
        The env.

    Raises:
        ValueError: for another backend.
    """
    if not isinstance(backend, str) or backend.lower() not in WORLD_MODEL_BACKENDS:
        raise ValueError(
            f"Unknown backend {backend!r}; there is {WORLD_MODEL_BACKENDS[0]!r} (also "
            f"{', '.join(map(repr, WORLD_MODEL_BACKENDS[1:]))}). Real envs are made by "
            f"gymnasium.make or torchrl.envs.GymEnv."
        )
    return make_world_model_env(model, **kwargs)
