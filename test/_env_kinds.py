"""Reference envs of every kind that the builders serve, and real data."""

from __future__ import annotations

from functools import cache

import gymnasium
import numpy as np
import torch
from _models import SpecEnv
from _wirings import ACTIONS
from tensordict import TensorDict
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import GymEnv, GymWrapper

OBSERVATIONS = {
    "vector": {"observation": (3,)},
    "nested": {("robot", "state"): (3,)},
    "dictionary": {"goal": (2,), ("robot", "joints"): (2, 2), ("robot", "speed"): ()},
}


def env_of(observations: str, actions: str, size=(), *, nested: bool = False):
    """A reference env; its action, reward and done entries may stand below a key."""
    env = SpecEnv(
        size,
        action_spec=ACTIONS[actions](),
        action_key=("agent", "move") if nested else "action",
        reward_key=("agent", "score") if nested else "reward",
    )
    spec = Composite(shape=())
    for key, shape in OBSERVATIONS[observations].items():
        spec[key] = Unbounded(shape)
    env.observation_spec = spec.expand(env.batch_size).clone()
    if nested:
        flag = Categorical(2, (1,), dtype=torch.bool)
        done = Composite(agent=Composite(done=flag, terminated=flag.clone()))
        env.done_spec = done.expand(env.batch_size).clone()
    return env


def drawn_transitions(env, *size: int) -> TensorDict:
    """Transitions drawn from the specs of an env."""
    td = env.full_observation_spec_unbatched.rand(size)
    td.update(env.full_action_spec_unbatched.rand(size))
    following = env.full_observation_spec_unbatched.rand(size)
    following.update(env.full_reward_spec_unbatched.rand(size))
    following.update(env.full_done_spec_unbatched.zero(size))
    return td.set("next", following)


def real_env(name: str) -> GymEnv | GymWrapper:
    """A Gymnasium env, or the dot."""
    return GymWrapper(Dot()) if name == "dot" else GymEnv(name)


@cache
def episodes(name: str, rows: int, steps: int, seed: int) -> TensorDict:
    """Random play in a real env, ``[rows, steps]``."""
    torch.manual_seed(seed)
    env = real_env(name)
    env.set_seed(seed)
    rollouts = [env.rollout(steps, break_when_any_done=False) for _ in range(rows)]
    return torch.stack(rollouts)


def trained(loss, data: TensorDict, steps: int, *, lr: float = 3e-3, batch: int = 64):
    """Train on transitions, ``[N]`` or, whole rows of, ``[N, T]``."""
    optimizer = torch.optim.Adam(loss.parameters(), lr=lr)
    for _ in range(steps):
        rows = torch.randint(len(data), (batch,))
        loss(data[rows]).sum(reduce=True).backward()
        optimizer.step()
        optimizer.zero_grad()


class Dot(gymnasium.Env):
    """A dot that the action moves over an image of 16 times 16, bytes or floats."""

    SIDE = 16

    def __init__(self, *, dtype=np.uint8, channels_first: bool = False) -> None:
        shape = (
            (1, self.SIDE, self.SIDE) if channels_first else (self.SIDE, self.SIDE, 1)
        )
        high = 255 if dtype is np.uint8 else 1.0
        self.observation_space = gymnasium.spaces.Dict(
            {"view": gymnasium.spaces.Box(0, high, shape, dtype)}
        )
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.place = np.zeros(2)

    def _observation(self) -> dict:
        space = self.observation_space["view"]
        axes = np.arange(self.SIDE)
        rows, columns = (np.exp(-((axes - p) ** 2) / 8) for p in self.place)
        image = np.outer(rows, columns).reshape(space.shape) * space.high.max()
        return {"view": image.astype(space.dtype)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(4, self.SIDE - 5, 2)
        return self._observation(), {}

    def step(self, action):
        self.place = np.clip(self.place + 2 * action, 2, self.SIDE - 3)
        distance = np.abs(self.place - self.SIDE / 2).sum() / self.SIDE
        return self._observation(), -float(distance), False, False, {}
