"""Entries of dtypes that numpy or Gymnasium's boxes do not have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _models import SpecEnv
from gymnasium import spaces
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torchrl.data import Binary, Bounded, Unbounded

from torchrl_wm import (
    GymWorldModelEnv,
    GymWorldModelVectorEnv,
    WorldModel,
    WorldModelEnv,
)
from torchrl_wm.export.spaces import space_of_spec

HALF = torch.bfloat16


def made(encode, decode=None, action=None, **kwargs) -> WorldModelEnv:
    """An env whose latent is what ``encode`` makes of the observation, and stands still."""
    start = TensorDict({"observation": torch.tensor([[1.0, -1.0, 1.0]])}, [1])
    decoder = Mod(decode, ["latent"], ["shown"]) if decode else None
    return WorldModelEnv(
        WorldModel(
            Mod(encode, ["observation"], ["latent"]),
            Mod(
                lambda latent, action: latent.clone(),
                ["latent", "action"],
                [("next", "latent")],
            ),
            Mod(
                lambda latent: latent[..., :1].float(),
                [("next", "latent")],
                [("next", "reward")],
            ),
            decoder=decoder,
        ),
        SpecEnv(observation=3, action_spec=action),
        start_states=start,
        batch_size=[],
        decode=decode is not None,
        **kwargs,
    )


def check(make, space: spaces.Space, value: list) -> None:
    zero = np.zeros(2, np.float32)
    env = GymWorldModelEnv(make())
    assert env.observation_space == space
    for observation in (env.reset(seed=0)[0], env.step(zero)[0]):
        assert space.contains(observation) and observation.tolist() == value
    envs = GymWorldModelVectorEnv(make(), num_envs=2)
    for observation in (envs.reset(seed=0)[0], envs.step(np.stack([zero] * 2))[0]):
        assert envs.observation_space.contains(observation)
        assert observation.tolist() == [value] * 2
    again, _ = env.reset(options={"state": {"latent": env.state["latent"]}})
    assert again.tolist() == value


def test_bool_latents_and_decoded_entries_are_bits() -> None:
    bits = spaces.MultiBinary(3)
    check(lambda: made(lambda x: x > 0), bits, [1, 0, 1])
    check(lambda: made(torch.clone, lambda x: x > 0), bits, [1, 0, 1])
    env = GymWorldModelEnv(made(lambda x: x > 0), bits)
    first, _ = env.reset(seed=0)
    assert env.reset(options={"state": 1 - first})[0].tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="expected are .* torch.bool"):
        env.reset(options={"state": np.array([0, 1, 2])})


def test_bfloat16_is_float32_in_spaces() -> None:
    box = spaces.Box(-np.inf, np.inf, (3,))
    check(lambda: made(lambda x: x.to(HALF)), box, [1, -1, 1])
    check(lambda: made(torch.clone, lambda x: x.to(HALF)), box, [1, -1, 1])
    action = Bounded(-2.0, 2.0, (2,), dtype=HALF)
    check(lambda: made(torch.clone, action=action), box, [1, -1, 1])
    env = GymWorldModelEnv(made(torch.clone, action=action))
    assert env.action_space == spaces.Box(-2, 2, (2,))


@pytest.mark.parametrize(
    "spec, space",
    [
        (Unbounded((2,), dtype=torch.bool), spaces.MultiBinary(2)),
        (Unbounded((2, 3), dtype=torch.bool), spaces.MultiBinary((2, 3))),
        (Binary(3, dtype=torch.bool), spaces.MultiBinary(3)),
        (Binary(3, (2, 3), dtype=torch.bool), spaces.MultiBinary((2, 3))),
        (Unbounded((2,), dtype=HALF), spaces.Box(-np.inf, np.inf, (2,))),
        (Bounded(-1, 2, (), dtype=HALF), spaces.Box(-1, 2, ())),
        (
            Bounded(torch.tensor([0.0, 1.0]), torch.inf, (2,), dtype=HALF),
            spaces.Box(np.array([0, 1], np.float32), np.inf, (2,)),
        ),
    ],
    ids=["bool", "bool matrix", "bits", "bit matrix", "half", "scalar", "half-bounded"],
)
def test_spaces(spec, space) -> None:
    assert space_of_spec(spec) == space
