"""Small real envs, and settings of the recipes that take no time."""

from __future__ import annotations

import os
import signal

import gymnasium
import numpy as np
from torchrl.envs import GymEnv, GymWrapper, RenameTransform, TransformedEnv

PETS = {
    "env": "Pendulum-v1",
    "max_episode_steps": 12,
    "random_steps": 20,
    "trials": 2,
    "model_steps": 6,
    "model_batch_size": 16,
    "members": 3,
    "hidden": (16,),
    "planning_horizon": 4,
    "optim_steps": 2,
    "num_candidates": 12,
    "top_k": 4,
    "num_particles": 2,
}
MBPO = {
    "env": "Pendulum-v1",
    "max_episode_steps": 15,
    "random_steps": 20,
    "steps": 60,
    "members": 3,
    "elites": 2,
    "hidden": (16,),
    "horizon_schedule": (0, 0, 1, 1),
    "model_interval": 10,
    "model_steps": 4,
    "model_batch_size": 16,
    "imagination_interval": 10,
    "rollouts": 20,
    "retained_rounds": 2,
    "updates_per_step": 2,
    "batch_size": 16,
    "policy_hidden": (16,),
    "evaluation_interval": 30,
    "evaluation_episodes": 2,
}
TDMPC2 = {
    "env": "Pendulum-v1",
    "max_episode_steps": 12,
    "random_steps": 20,
    "steps": 48,
    "pretraining_updates": 4,
    "evaluation_interval": 24,
    "evaluation_episodes": 1,
    "latent_size": 16,
    "num_cells": 16,
    "encoder_cells": 16,
    "pixel_depth": 2,
    "batch_size": 8,
    "num_candidates": 12,
    "policy_candidates": 2,
    "optim_steps": 2,
    "top_k": 4,
    "preset": "small",
    "logger": "csv",
}


_RECURRENT = {
    "env": "Pendulum-v1",
    "max_episode_steps": 12,
    "random_steps": 20,
    "steps": 48,
    "evaluation_interval": 24,
    "evaluation_episodes": 1,
    "belief_size": 16,
    "hidden_size": 8,
    "num_cells": 8,
    "depth": 1,
    "pixel_depth": 2,
    "batch_size": 4,
    "batch_length": 6,
    "train_ratio": 8.0,
    "preset": "small",
    "logger": "csv",
}
DREAMER = {
    **_RECURRENT,
    "categoricals": 4,
    "classes": 4,
    "horizon": 4,
    "imagine_every": 2,
}
PLANET = {
    **_RECURRENT,
    "state_size": 4,
    "planning_horizon": 3,
    "num_candidates": 12,
    "optim_steps": 2,
    "top_k": 4,
}
TRANSFORMER = {
    **{key: value for key, value in PLANET.items() if key != "state_size"},
    "model": "transformer",
    "context": 4,
}


def make_nested() -> TransformedEnv:
    """A pendulum whose entries are those of an agent."""
    return TransformedEnv(
        GymEnv("Pendulum-v1"),
        RenameTransform(
            ["observation", "reward"],
            [("agent", "observation"), ("agent", "reward")],
            ["action"],
            [("agent", "action")],
        ),
    )


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


def draw_reacher(observation):
    """A bar as high as the reacher is far from the origin."""
    frame = np.zeros((10, 30), np.uint8)
    frame[: int(abs(observation["place"][0]))] = 255
    return frame


class Unbounded(Reacher1D):
    """Its actions have no bounds."""

    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))


class LastAction(Reacher1D):
    """Observes its last action, plus 5, under a name such as "action"."""

    def __init__(self, name: str = "action") -> None:
        self.name = name
        spaces = {"place": gymnasium.spaces.Box(-9, 9, (1,))}
        spaces[name] = gymnasium.spaces.Box(-9, 9, (1,))
        self.observation_space = gymnasium.spaces.Dict(spaces)
        self.last = np.zeros(1, np.float32)

    def reset(self, *, seed=None, options=None):
        self.last = np.zeros(1, np.float32)
        return super().reset(seed=seed)

    def step(self, action):
        self.last = 5 + np.asarray(action, np.float32)
        return super().step(action)

    def _observation(self):
        return {"place": self.state[:1].copy(), self.name: self.last.copy()}


class Stopping(gymnasium.Wrapper):
    """Sends its own process a signal at one step, which no other process has to be in time for."""

    steps = 0

    def step(self, action):
        self.steps += 1
        name, _, step = os.environ.get("STOP_AT_STEP", "").partition(":")
        if name and self.steps == int(step):
            # One that the parent ignores, as shells do for what runs in the background, stays so.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.kill(os.getpid(), signal.Signals[name])
        return super().step(action)


def make_stopping():
    """A pendulum; with ``STOP_AT_STEP=SIGINT:29`` in the environment, Ctrl-C at its 29th step."""
    return Stopping(gymnasium.make("Pendulum-v1"))


class Ragged(gymnasium.Env):
    """Its episodes have 3 to 9 steps, as the seed says; observes a place and the steps left."""

    observation_space = gymnasium.spaces.Box(-99, 99, (2,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(3, 10))
        self.place = float(self.np_random.uniform(-1, 1))
        return self._observation(), {}

    def step(self, action):
        self.place += 0.1 * float(action[0]) + 0.01 * float(self.np_random.normal())
        self.left -= 1
        return self._observation(), -abs(self.place), self.left == 0, False, {}

    def _observation(self):
        return np.array([self.place, self.left], np.float32)


class Several(Ragged):
    """Its action is several choices."""

    action_space = gymnasium.spaces.MultiDiscrete([2, 3])


class Shown(Ragged):
    """Shows a bar at its place, 24 by 40 pixels; the class counts its frames."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    frames = 0

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def render(self):
        type(self).frames += 1
        frame = np.zeros((24, 40, 3), np.uint8)
        place = int(np.clip(20 + 10 * self.place, 0, 36))
        frame[:, place : place + 4] = (255, 128, 0)
        return frame


def make_nested_ragged() -> TransformedEnv:
    """A ragged env whose entries are those of an agent."""
    return TransformedEnv(
        GymWrapper(Ragged()),
        RenameTransform(
            ["observation", "reward"],
            [("agent", "observation"), ("agent", "reward")],
            ["action"],
            [("agent", "action")],
        ),
    )


class Pictures(gymnasium.Env):
    """Its observation is a small picture with a bar at the place, and the speed."""

    observation_space = gymnasium.spaces.Dict(
        {
            "pixels": gymnasium.spaces.Box(0, 255, (16, 16, 3), np.uint8),
            "speed": gymnasium.spaces.Box(-9, 9, (1,)),
        }
    )
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = int(self.np_random.integers(16))
        return self._observation(0.0), {}

    def step(self, action):
        self.place = (self.place + round(2 * float(action[0]))) % 16
        reward = -abs(self.place - 8) / 8
        return self._observation(float(action[0])), reward, False, False, {}

    def _observation(self, speed):
        pixels = np.zeros((16, 16, 3), np.uint8)
        pixels[:, self.place] = 255
        return {"pixels": pixels, "speed": np.array([speed], np.float32)}
