"""Models of other makes than ours, for the tests of the Gymnasium export."""

from __future__ import annotations

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import nn

from torchrl_wm import GymWorldModelEnv

OBSERVED, ACTED = 3, 2
OBS_SPACE = Box(-np.inf, np.inf, (OBSERVED,), np.float32)
ACTION_SPACE = Box(-1.0, 1.0, (ACTED,), np.float32)


class Net(nn.Module):
    """A latent model in torch: a state of 4, decoded to an observation of 3."""

    def __init__(self, noise: float = 0.0, batch: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.dynamics = nn.Linear(4 + ACTED, 4)
        self.decoder = nn.Linear(4, OBSERVED)
        self.dropout = nn.Dropout(0.5)
        self.noise, self.batch = noise, batch
        self.calls = 0

    def reset(self, seed=None, options=None):
        state = torch.ones(*self.batch, 4)
        return state, self.decode(state), {}

    def decode(self, state):
        return self.decoder(state)

    def step(self, state, action):
        self.calls += 1
        state = torch.tanh(self.dynamics(torch.cat([state, action], -1)))
        state = self.dropout(state + self.noise * torch.randn_like(state))
        return state, self.decoder(state), state.sum(-1)


class Clock:
    """A numpy model whose state is the time; the observation is the time three times."""

    def __init__(self) -> None:
        self.closed = False
        self.seeds: list = []

    def reset(self, seed=None, options=None):
        self.seeds.append(seed)
        return np.zeros(1), self.observe(np.zeros(1))

    def step(self, state, action):
        return state + 1, self.observe(state + 1), float(state[0])

    def close(self):
        self.closed = True

    @staticmethod
    def observe(state):
        return np.full(OBSERVED, state[0], np.float32)


ZERO = np.zeros(ACTED, np.float32)


def net_env(noise: float = 0.0, seed: int = 0) -> GymWorldModelEnv:
    """An env of :class:`Net`; here, where the workers of other processes find it."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)  # the same weights everywhere
    return GymWorldModelEnv(Net(noise), OBS_SPACE, ACTION_SPACE, max_episode_steps=20)
