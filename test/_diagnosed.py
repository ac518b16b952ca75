"""Models whose predictions are known, and episodes to compare them with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from _models import clock_env, SpecEnv
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torchrl.data import Bounded

from torchrl_wm import WorldModel, WorldModelEnv
from torchrl_wm.modules.keys import join


def line(length: int, slope: float, ends: tuple[int, ...] = ()) -> TensorDict:
    """An episode whose observation moves by ``slope`` a step."""
    time = torch.arange(length + 1.0).unsqueeze(-1) * slope
    done = torch.zeros(length, 1, dtype=torch.bool)
    done[list(ends)] = True
    return TensorDict(
        {
            "observation": time[:-1],
            "action": torch.zeros(length, 1),
            "next": {"observation": time[1:], "reward": time[1:] + 1, "done": done},
        },
        batch_size=[length],
    )


def observed_clock() -> WorldModelEnv:
    """A model of the observation itself that believes it moves by one a step."""
    model = WorldModel(
        Mod(nn.Identity(), ["observation"], ["observation"]),
        Mod(lambda x, a: x + 1, ["observation", "action"], [("next", "observation")]),
        Mod(lambda x: x + 0, [("next", "observation")], [("next", "reward")]),
    )
    return WorldModelEnv(model, clock_env())


def walk(
    *size: int, noise: float = 1.0, dim: int = 2, key: NestedKey = "observation"
) -> TensorDict:
    """Episodes ``[*B, T]`` of ``x' = x + a + noise``, with the reward ``sum(x')``."""
    action = torch.rand(*size, dim) * 2 - 1
    change = action + noise * torch.randn(*size, dim)
    after = change.cumsum(-2)
    done = torch.zeros(*size, 1, dtype=torch.bool)
    out = TensorDict({"action": action}, batch_size=size)
    out.set(key, after - change)
    out.set(join("next", key), after)
    out.set(("next", "reward"), after.sum(-1, keepdim=True))
    for name in ("done", "terminated", "truncated"):
        out.set(("next", name), done.clone())
    return out


def walk_env(
    offsets: Sequence[float] = (0.0,),
    scale: float = 1.0,
    *,
    sample: bool = False,
    dim: int = 2,
    key: NestedKey = "observation",
    done_head: Mod | None = None,
) -> WorldModelEnv:
    """An ensemble that knows the walk, but that member ``e`` is off by ``offsets[e]``."""
    shift = torch.tensor(offsets, dtype=torch.float32).unsqueeze(-1)

    def step(position, action):
        means = (position + action).unsqueeze(-2) + shift  # [*B, E, D]
        variance = torch.full_like(means, 2.0 * torch.tensor(scale).log())
        mean = means.mean(-2)
        following = mean + scale * torch.randn_like(mean) if sample else mean
        return following, means, variance

    model = WorldModel(
        Mod(nn.Identity(), [key], [key]),
        Mod(
            step,
            [key, "action"],
            [join("next", key), ("next", "loc"), ("next", "log_var")],
        ),
        Mod(lambda x: x.sum(-1, True), [join("next", key)], [("next", "reward")]),
        done_head=done_head,
    )
    specs = SpecEnv(
        observation=dim, observation_key=key, action_spec=Bounded(-1.0, 1.0, (dim,))
    )
    return WorldModelEnv(model, specs)


def padded(episodes: TensorDict, steps: int) -> TensorDict:
    """The same episodes with steps of NaN at their ends, which the mask calls invalid."""
    *size, length = episodes.batch_size
    rubbish = episodes[..., :1].expand(*size, steps).clone()
    rubbish = rubbish.apply(
        lambda x: x.fill_(float("nan")) if x.is_floating_point() else x
    )
    mask = torch.ones(*size, length + steps, dtype=torch.bool)
    mask[..., length:] = False
    return torch.cat([episodes, rubbish], -1).set(("collector", "mask"), mask)
