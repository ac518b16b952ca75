"""Observations that are choices: as the real Gymnasium env has them, numbers of options."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _models import SpecEnv
from gymnasium import spaces
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch.nn.functional import one_hot
from torchrl.data import Categorical, Composite, MultiOneHot, OneHot, TensorSpec
from torchrl.envs import GymEnv

from torchrl_wm import (
    GymWorldModelEnv,
    GymWorldModelVectorEnv,
    WorldModel,
    WorldModelEnv,
)

CHOICES = [
    # spec, space, one env's value, and what the spec makes of it
    (OneHot(4), spaces.Discrete(4), 2, [0, 0, 1, 0]),
    (OneHot(4, dtype=torch.int64), spaces.Discrete(4), 2, [0, 0, 1, 0]),
    (OneHot(4, dtype=torch.float32), spaces.Discrete(4), 2, [0, 0, 1, 0]),
    (OneHot(4, (1, 4)), spaces.Discrete(4), 2, [[0, 0, 1, 0]]),
    (
        OneHot(3, (2, 3)),
        spaces.MultiDiscrete([3, 3]),
        [0, 2],
        [[1, 0, 0], [0, 0, 1]],
    ),
    (MultiOneHot([2, 3]), spaces.MultiDiscrete([2, 3]), [1, 2], [0, 1, 0, 0, 1]),
    (Categorical(4), spaces.Discrete(4), 2, 2),
    (Categorical(4, (1,)), spaces.Discrete(4), 2, [2]),
]


def still(spec: TensorSpec, **kwargs) -> WorldModelEnv:
    """An env whose latent is its observation, of a given spec, and never moves."""

    def reward(value: torch.Tensor) -> torch.Tensor:
        rows = value.float()
        for _ in range(len(spec.shape) - 1):
            rows = rows.sum(-1)
        return rows.sum(-1, keepdim=True) if spec.shape else rows.unsqueeze(-1)

    base = SpecEnv()
    base.observation_spec = Composite(observation=spec.clone())
    return WorldModelEnv(
        WorldModel(
            Mod(torch.clone, ["observation"], ["observation"]),
            Mod(
                lambda value, action: value.clone(),
                ["observation", "action"],
                [("next", "observation")],
            ),
            Mod(reward, [("next", "observation")], [("next", "reward")]),
        ),
        base,
        batch_size=[],
        observation_spec=Composite(observation=spec.clone()),
        **kwargs,
    )


def rows_of(spec: TensorSpec, one: list, number: int = 3) -> TensorDict:
    value = torch.tensor(one).to(spec.dtype).expand(number, *spec.shape)
    return TensorDict({"observation": value}, [number])


@pytest.mark.parametrize("spec, space, number, one", CHOICES)
def test_choices_are_numbers(spec, space, number, one) -> None:
    env = GymWorldModelEnv(still(spec, start_states=rows_of(spec, one)))
    assert env.observation_space == space
    first, _ = env.reset(seed=0)
    for observation in (first, env.step(np.zeros(2, np.float32))[0]):
        assert space.contains(observation)
        assert np.array_equal(observation, number)
    envs = GymWorldModelVectorEnv(
        still(spec, start_states=rows_of(spec, one)), num_envs=2
    )
    first, _ = envs.reset(seed=0)
    for observation in (first, envs.step(np.zeros((2, 2), np.float32))[0]):
        assert envs.observation_space.contains(observation)
        assert np.array_equal(observation, [number] * 2)


@pytest.mark.parametrize("spec, space, number, one", CHOICES)
def test_episodes_begin_at_numbers_and_at_what_specs_have(
    spec, space, number, one
) -> None:
    env = GymWorldModelEnv(still(spec))
    for given in (number, np.array(number), np.array(one)):
        for what in ("observation", "state"):
            observation, _ = env.reset(options={what: given})
            assert np.array_equal(observation, number)
    for rows in (1, 2, 4):
        envs = GymWorldModelVectorEnv(still(spec), num_envs=rows)
        for given in ([number] * rows, [one] * rows):
            observation, _ = envs.reset(options={"observation": np.array(given)})
            assert np.array_equal(observation, [number] * rows)
        for given in (number, np.array(one)):
            envs = GymWorldModelVectorEnv(
                still(spec), num_envs=rows, initial_observation=given
            )
            assert np.array_equal(envs.reset()[0], [number] * rows)


@pytest.mark.parametrize("number", [4, -1])
def test_numbers_of_no_option(number) -> None:
    env = GymWorldModelEnv(still(OneHot(4)))
    with pytest.raises(ValueError, match="there are 4 of them"):
        env.reset(options={"observation": number})


def test_spaces_of_the_callers_own() -> None:
    env = still(OneHot(4), start_states=rows_of(OneHot(4), [0, 1, 0, 0]))
    assert GymWorldModelEnv(env, spaces.Discrete(4)).reset()[0] == 1
    named = spaces.Dict(observation=spaces.Discrete(4))
    assert GymWorldModelEnv(env, named).reset()[0] == {"observation": 1}
    raw = GymWorldModelEnv(env, spaces.MultiBinary(4)).reset()[0]
    assert raw.tolist() == [0, 1, 0, 0]
    spec = OneHot(4, dtype=torch.int64)
    ints = still(spec, start_states=rows_of(spec, [0, 1, 0, 0]))
    raw = GymWorldModelEnv(ints, spaces.Box(0, 1, (4,), np.int64)).reset()[0]
    assert raw.tolist() == [0, 1, 0, 0]
    for wrong in (spaces.Discrete(4, start=1), spaces.Discrete(5)):
        with pytest.raises(ValueError, match="observation_space"):
            GymWorldModelEnv(env, wrong)


@pytest.mark.parametrize("categorical", [False, True])
def test_a_model_of_frozen_lakes_own_observations(categorical) -> None:
    real = GymEnv("FrozenLake-v1", categorical_action_encoding=categorical)

    def step(now: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        if categorical:
            return (now + action) % 16
        moved = (now.long().argmax(-1) + action.long().argmax(-1)) % 16
        return one_hot(moved, 16).to(now.dtype)

    model = WorldModel(
        Mod(torch.clone, ["observation"], ["observation"]),
        Mod(step, ["observation", "action"], [("next", "observation")]),
        Mod(
            lambda action: action.float().reshape(*action.shape, -1)[..., :1]
            if categorical
            else action[..., :1].float(),
            ["action"],
            [("next", "reward")],
        ),
    )
    env = GymWorldModelEnv(WorldModelEnv(model, real, start_states=real))
    assert env.observation_space == spaces.Discrete(16)
    assert env.action_space == spaces.Discrete(4)
    assert env.reset(seed=0)[0] == 0
    assert [env.step(a)[0] for a in (1, 3, 0)] == [1, 4, 4]
    assert env.reset(options={"observation": 14})[0] == 14
    envs = GymWorldModelVectorEnv(
        WorldModelEnv(model, real, start_states=real), num_envs=2
    )
    assert envs.reset(seed=0)[0].tolist() == [0, 0]
    assert envs.step(np.array([1, 2]))[0].tolist() == [1, 2]


@pytest.mark.parametrize("categorical", [False, True])
def test_decoded_observations_of_frozen_lake(categorical) -> None:
    real = GymEnv("FrozenLake-v1", categorical_action_encoding=categorical)

    def encode(now: torch.Tensor) -> torch.Tensor:
        now = one_hot(now.long(), 16) if categorical else now
        return now.float()

    def decode(latent: torch.Tensor) -> torch.Tensor:
        number = latent.argmax(-1)
        return number if categorical else one_hot(number, 16)

    model = WorldModel(
        Mod(encode, ["observation"], ["latent"]),
        Mod(
            lambda latent, action: latent.roll(1, -1),
            ["latent", "action"],
            [("next", "latent")],
        ),
        Mod(lambda latent: latent[..., :1], [("next", "latent")], [("next", "reward")]),
        decoder=Mod(decode, ["latent"], ["observation"]),
    )

    def made() -> WorldModelEnv:
        return WorldModelEnv(model, real, start_states=real, decode=True, batch_size=[])

    for space in (None, spaces.Discrete(16)):
        env = GymWorldModelEnv(made(), space)
        assert env.observation_space == spaces.Discrete(16)
        assert env.reset(seed=0)[0] == 0 and env.step(1)[0] == 1
        assert env.reset(options={"observation": 7})[0] == 7
        assert env.step(1)[0] == 8
    envs = GymWorldModelVectorEnv(made(), num_envs=2)
    assert envs.reset(seed=0)[0].tolist() == [0, 0]
    assert envs.step(np.array([0, 1]))[0].tolist() == [1, 1]
    if not categorical:
        blocks = GymWorldModelEnv(made(), spaces.Box(0, 1, (16,), np.int64))
        assert blocks.reset(seed=0)[0].tolist() == [1] + [0] * 15
