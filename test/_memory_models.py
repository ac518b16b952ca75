"""A world model with memory: a cache and a count in the dynamics, a cell in the reward head."""

from __future__ import annotations

import torch
from _models import SpecEnv
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn

from torchrl_wm import WorldModel, WorldModelEnv
from torchrl_wm.modules.keys import join

OBS, ACTION, SLOTS, CELL = 6, 2, 16, 3


class Attentive(nn.Module):
    """The next latent from all latents before it, which a cache keeps in place."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2 * OBS + ACTION, OBS)

    def forward(self, latent, action, cache, count):
        # One place for all rows is what a transformer's cache has; rows differ in their counts.
        slots = torch.arange(SLOTS)
        here = (slots == count).unsqueeze(-1)
        cache = torch.where(here, latent.unsqueeze(-2), cache)
        seen = (slots <= count).unsqueeze(-1)
        mean = (cache * seen).sum(-2) / (count + 1)
        latent = latent + 0.1 * self.net(torch.cat([latent, mean, action], -1))
        return latent, cache, count + 1


class RecurrentReward(nn.Module):
    """A reward from a cell that the head itself moves."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(OBS + CELL, CELL)
        self.read = nn.Linear(CELL, 1)

    def forward(self, latent, cell):
        cell = torch.tanh(self.cell(torch.cat([latent, cell], -1)))
        return self.read(cell), cell


NAMES = [
    ("latent", "cache", "count", "cell"),
    (("deep", "latent"), ("deep", "cache"), ("far", "count"), ("far", "cell")),
]


def model_of(names=NAMES[0], *, memory: bool = True) -> WorldModel:
    """With memory; or the same model with latents only, all of which are recorded."""
    torch.manual_seed(0)
    latent, cache, count, cell = names
    begin = TensorDict({})
    begin[cache] = torch.zeros(SLOTS, OBS)
    begin[count] = torch.zeros(1, dtype=torch.int64)
    begin[cell] = torch.ones(CELL)
    return WorldModel(
        Mod(nn.Linear(OBS, OBS), ["observation"], [latent]),
        Mod(
            Attentive(),
            [latent, "action", cache, count],
            [join("next", key) for key in (latent, cache, count)],
        ),
        Mod(
            RecurrentReward(),
            [join("next", latent), cell],
            [("next", "reward"), join("next", cell)],
        ),
        memory=[cache, count, cell] if memory else [],
        initial_state=begin,
    )


def data(*size: int) -> TensorDict:
    torch.manual_seed(1)
    observed = torch.randn(*size[:-1], size[-1] + 1, OBS)
    begins = torch.zeros(*size, 1, dtype=torch.bool)
    return TensorDict(
        {
            "observation": observed[..., :-1, :],
            "action": torch.rand(*size, ACTION),
            "is_init": begins,
            "next": {
                "observation": observed[..., 1:, :],
                "reward": torch.randn(*size, 1),
                "done": begins.clone(),
            },
        },
        size,
    )


class RealEnv(SpecEnv):
    """Begins at random, and cannot be stepped but in imagination."""

    def _reset(self, tensordict, **kwargs):
        return self.observation_spec.rand().update(self.full_done_spec.zero())

    def _step(self, tensordict):
        out = self.observation_spec.rand().update(self.full_done_spec.zero())
        return out.update(self.full_reward_spec.zero())


def imagined_env() -> WorldModelEnv:
    """A model's env that begins at random and ends after four steps."""
    return WorldModelEnv(model_of(), SpecEnv(), start_states=RealEnv(), max_steps=4)
