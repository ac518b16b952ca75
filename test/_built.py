"""Envs that builders are asked to serve, and sequences of them."""

from __future__ import annotations

import torch
from _models import SpecEnv
from _wirings import ACTIONS
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, OneHot, Unbounded
from torchrl.envs import EnvBase


class ObservingEnv(SpecEnv):
    """Specs with other observations."""

    def __init__(self, observations: dict, **kwargs) -> None:
        super().__init__(**kwargs)
        spec = Composite(shape=())
        for key, leaf in observations.items():
            spec[key] = leaf
        self.observation_spec = spec


def image(*shape: int, floats: bool = False) -> Bounded:
    if floats:
        return Bounded(0.0, 1.0, shape, dtype=torch.float32)
    return Bounded(0, 255, shape, dtype=torch.uint8)


OBSERVATIONS = {
    "vector": {"observation": Unbounded((5,))},
    "float64": {"observation": Unbounded((5,), dtype=torch.float64)},
    "dictionary": {"position": Unbounded((2, 3)), ("arm", "angle"): Unbounded((1,))},
    "one-hot": {"cell": OneHot(4), "speed": Unbounded((1,))},
    "pixels": {"pixels": image(8, 8, 3)},
    "channels first": {"pixels": image(3, 16, 12, floats=True)},
    "grey": {"pixels": image(9, 10)},
    "pixels and vector": {("camera", "image"): image(8, 8, 3), "x": Unbounded((2,))},
}
#: Every family of observations with one action, and of actions with one observation.
CASES = [(name, "bounded") for name in OBSERVATIONS]
CASES += [("vector", name) for name in ACTIONS if name != "bounded"]


def made_env(observations: str = "vector", action: str = "bounded", **kwargs):
    return ObservingEnv(
        OBSERVATIONS[observations], action_spec=ACTIONS[action](), **kwargs
    )


def sequences(env: EnvBase, *size: int) -> TensorDictBase:
    """Random transitions of the env's specs, without ends."""

    def rand(spec: Composite) -> TensorDictBase:
        spec = spec.clone()
        for key in spec.keys(True, True):
            if type(spec[key]) is Unbounded:  # of moderate size
                shape, dtype = spec[key].shape, spec[key].dtype
                spec[key] = Bounded(-1, 1, shape, dtype=dtype)
        return spec.rand(size)

    out = TensorDict({}, batch_size=size)
    out.update(rand(env.full_observation_spec)).update(rand(env.full_action_spec))
    ahead = rand(env.full_observation_spec).update(rand(env.full_reward_spec))
    out.set("next", ahead.update(env.full_done_spec.zero(size)))
    return out


class DotEnv(EnvBase):
    """A dot on a small image, pushed by the action; reward for being in the middle."""

    side = 8

    def __init__(self) -> None:
        super().__init__()
        shape = (self.side, self.side, 1)
        self.observation_spec = Composite(pixels=image(*shape))
        self.action_spec = Bounded(-1.0, 1.0, (2,))
        self.reward_spec = Unbounded((1,))
        flag = Categorical(2, (1,), dtype=torch.bool)
        self.done_spec = Composite(done=flag, terminated=flag.clone())
        self.place = torch.zeros(2)

    def _seen(self) -> torch.Tensor:
        axis = torch.linspace(-1, 1, self.side)
        x, y = ((axis - p).pow(2) / 0.1 for p in self.place)
        blob = torch.exp(-x.unsqueeze(-1) - y)
        return (255 * blob).to(torch.uint8).unsqueeze(-1)

    def _reset(self, tensordict, **kwargs):
        self.place = torch.rand(2) * 1.6 - 0.8
        return TensorDict({"pixels": self._seen()})

    def _step(self, tensordict):
        self.place = (self.place + 0.5 * tensordict["action"]).clamp(-0.9, 0.9)
        done = torch.zeros(1, dtype=torch.bool)
        return TensorDict(
            {
                "pixels": self._seen(),
                "reward": -self.place.norm(keepdim=True),
                "done": done,
                "terminated": done.clone(),
            }
        )

    def _set_seed(self, seed):
        torch.manual_seed(seed)


def slices(episodes: list[TensorDictBase], rows: int, length: int) -> TensorDictBase:
    """Random slices of episodes, ``[rows, length]``."""
    long = [episode for episode in episodes if episode.shape[0] >= length]
    out = []
    for _ in range(rows):
        episode = long[int(torch.randint(len(long), ()))]
        start = int(torch.randint(episode.shape[0] - length + 1, ()))
        out.append(episode[start : start + length])
    return torch.stack(out)


def train(
    loss,
    episodes,
    *,
    steps: int,
    rows: int,
    length: int,
    lr: float = 2e-3,
    one_cycle: bool = False,
):
    """Train a model on slices; the first and the last losses."""
    optimizer = torch.optim.Adam(loss.parameters(), lr=lr)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    if one_cycle:
        rate = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, lr, total_steps=steps, pct_start=0.05
        )
    history = []
    for _ in range(steps):
        total = loss(slices(episodes, rows, length)).sum(reduce=True)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(loss.parameters(), 100.0)
        optimizer.step(), rate.step()
        history.append(total.item())
    return history


def relative_error(env, episodes, horizon: int) -> dict:
    """Per entry, the model's k-step error over that of persistence, on the mean over episodes."""
    from torchrl_wm.diagnostics import open_loop_error

    long = [episode for episode in episodes if episode.shape[0] >= horizon]
    errors = [open_loop_error(env, episode, horizon) for episode in long]
    total = torch.stack(errors).mean(0)
    return {
        key: total["model", key].flatten(1).pow(2).mean(-1).sqrt()
        / total["persistence", key].flatten(1).pow(2).mean(-1).sqrt()
        for key in total["persistence"].keys(True, True)
    }
