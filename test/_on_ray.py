"""What tests send to workers of Ray, which find it by the name of this module."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import gymnasium
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn


class Pushing(TensorDictModuleBase):
    """A policy whose action is a parameter and a buffer."""

    in_keys, out_keys = [("agent", "observation")], [("agent", "action")]

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(0.0))
        self.register_buffer("whole", torch.tensor(0))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        place = tensordict.get(self.in_keys[0])
        pushed = torch.full_like(place[..., :1], float(self.value + self.whole))
        return tensordict.set(self.out_keys[0], pushed)


class Mortal:
    """A function that makes a pendulum; the process of the first to get so far is killed."""

    def __init__(self, marker: Path, steps: int) -> None:
        self.marker, self.steps = marker, steps

    def __call__(self):
        marker, last = self.marker, self.steps

        class Killed(gymnasium.Wrapper):
            count = 0

            def step(self, action):
                self.count += 1
                if self.count == last:
                    try:
                        marker.touch(exist_ok=False)
                    except FileExistsError:
                        pass
                    else:
                        os.kill(os.getpid(), signal.SIGKILL)
                return super().step(action)

        return Killed(gymnasium.make("Pendulum-v1"))
