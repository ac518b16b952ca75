"""Rewards that are no floats."""

from __future__ import annotations

import re

import pytest
import torch
import torchrl
from _built import sequences
from _models import SpecEnv
from _small_models import MAKE
from torchrl.data import Composite, Unbounded

PREDICTED = ("ensemble", "jepa", "mlp", "planet", "dreamer-v2")
#: Rewards as classes, or as a function that is known.
NOT_PREDICTED = {
    "dreamer-v3": {},
    "tdmpc2": {},
    "ensemble": {"reward_function": lambda o, a, n: n[..., 0]},
}
KEYS = ["reward", ("robot", "gain")]


def env_of(key, dtype) -> SpecEnv:
    env = SpecEnv(reward_key=key)
    spec = Composite(shape=())
    spec[key] = Unbounded((1,), dtype=dtype)
    env.reward_spec = spec
    return env


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
@pytest.mark.parametrize("name", PREDICTED)
def test_they_are_refused_where_they_are_predicted(name, dtype, key) -> None:
    env = env_of(key, dtype)
    with pytest.raises(ValueError, match="reward as a float") as error:
        MAKE[name](env)
    assert f"the reward {key!r} of the env is {dtype}" in str(error.value)
    # What the message says to do, does it.
    call = re.search(r"Convert it: (.*)\.$", str(error.value))[1]
    floats = eval(call, {"torchrl": torchrl, "torch": torch, "env": env})
    world_model, loss = MAKE[name](floats)
    batch = sequences(floats, 4, 3)
    assert batch["next"].get(key).is_floating_point()
    loss(batch).sum(reduce=True).backward()
    grads = [p.grad for p in world_model.parameters()]
    assert any(grad is not None and grad.any() for grad in grads)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("name", NOT_PREDICTED)
def test_they_are_served_where_they_are_classes_or_known(name, key) -> None:
    env = env_of(key, torch.int64)
    world_model, loss = MAKE[name](env, **NOT_PREDICTED[name])
    batch = sequences(env, 4, 3)
    losses = loss(batch)
    assert all(value.isfinite() for value in losses.values())
    losses.sum(reduce=True).backward()
    out = world_model(batch.exclude("next").clone())["next"].get(key)
    assert out.dtype is torch.int64
