"""CartPole with a continuous force, the task on which PETS is usually shown."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.classic_control import CartPoleEnv


class ContinuousCartPoleEnv(CartPoleEnv):
    """Gymnasium's CartPole, pushed with ``10 a`` newtons for an action ``a`` in ``[-1, 1]``.

    Importing torchrl_wm registers it as ``torchrl_wm/ContinuousCartPole-v0``, with a time
    limit of 200 steps; the reward is 1 for each step.

    Examples:
        >>> import gymnasium
        >>> import torchrl_wm
        >>> env = gymnasium.make("torchrl_wm/ContinuousCartPole-v0")
        >>> env.action_space
        Box(-1.0, 1.0, (1,), float32)
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self._newtons = self.force_mag

    def step(self, action: np.ndarray) -> tuple:
        """Make a step of 0.02 s."""
        force = float(np.clip(np.asarray(action).reshape(-1)[0], -1.0, 1.0))
        # CartPole pushes to the right with force_mag for the action 1.
        self.force_mag = self._newtons * force
        spaces, self.action_space = self.action_space, gymnasium.spaces.Discrete(2)
        try:
            return super().step(1)
        finally:
            self.action_space, self.force_mag = spaces, self._newtons
