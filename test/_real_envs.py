"""Real envs for the recipes."""

from __future__ import annotations

import gymnasium
import numpy as np


class Reacher1D(gymnasium.Env):
    """Go to the origin; the observation is a dictionary."""

    observation_space = gymnasium.spaces.Dict(
        {
            "place": gymnasium.spaces.Box(-9, 9, (1,)),
            "speed": gymnasium.spaces.Box(-9, 9, (1,)),
        }
    )
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-2, 2, 2).astype(np.float32)
        return self._observation(), {}

    def step(self, action):
        self.state[1] = np.clip(self.state[1] + 0.2 * action[0], -1, 1)
        self.state[0] += 0.2 * self.state[1]
        ended = bool(abs(self.state[0]) > 4)
        return self._observation(), -abs(float(self.state[0])), ended, False, {}

    def _observation(self):
        place, speed = self.state.reshape(2, 1)
        return {"place": place.copy(), "speed": speed.copy()}


def make_reacher():
    return Reacher1D()


class Unbounded(Reacher1D):
    """Its actions have no bounds."""

    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))
