"""What a second reader of the Gymnasium envs found, kept from coming back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from torchrl_wm import GymWorldModelEnv, GymWorldModelVectorEnv

OBS, ACT = Box(-1, 1, (3,)), Box(-1, 1, (2,))


class Named:
    """Two envs, of which the first ends at each step; the steps have a name."""

    def reset(self, options):
        return np.zeros((options["num_envs"], 3), np.float32)

    def step(self, state, action):
        ended = np.array([True, False])
        return state, state, state[:, 0], ended, ~ended & ended, {"name": "x"}


def vector_env(**kwargs) -> GymWorldModelVectorEnv:
    return GymWorldModelVectorEnv(Named(), OBS, ACT, num_envs=2, **kwargs)


def test_a_closed_vector_env_renders_nothing() -> None:
    env = vector_env(
        render_mode="rgb_array",
        render_fn=lambda obs: np.zeros((4, 4, 3), np.uint8),
    )
    env.reset(seed=0)
    assert len(env.render()) == 2
    env.close()
    with pytest.raises(RuntimeError, match="closed"):
        env.render()


def test_objects_that_are_not_said_are_none() -> None:
    env = vector_env(autoreset_mode="SameStep")
    env.reset(seed=0)
    infos = env.step(np.zeros((2, 2), np.float32))[-1]
    assert infos["name"].tolist() == [None, "x"]
    assert infos["_name"].tolist() == [False, True]


def test_arguments_of_a_reset_that_make_no_sense() -> None:
    env = vector_env()
    for seed in (1.5, "1", True, [1.5, 2]):
        with pytest.raises(ValueError, match="seed must be an int"):
            env.reset(seed=seed)
    single = GymWorldModelEnv(
        object(),
        OBS,
        ACT,
        initial_observation=np.zeros(3),
        transition_fn=lambda state, action: (state, state, 0.0),
    )
    for one in (env, single):
        for options in (5, "state", [1]):
            with pytest.raises(TypeError, match="options must be a dictionary"):
                one.reset(options=options)
    assert env.reset(seed=np.array([1, 2]))[0].shape == (2, 3)


@pytest.mark.parametrize("mode", [[], None, 3, "sometimes"])
def test_autoreset_modes_that_there_are_not(mode) -> None:
    with pytest.raises(ValueError, match="autoreset_mode must be one of"):
        vector_env(autoreset_mode=mode)


def test_options_for_each_env_that_say_the_same() -> None:
    pytest.importorskip("stable_baselines3")
    from torchrl_wm.export import SB3VecEnv

    def step(state, action):
        return state, state, state[:, 0]

    env = SB3VecEnv(
        object(),
        OBS,
        ACT,
        num_envs=2,
        initial_observation=np.zeros(3, np.float32),
        transition_fn=step,
    )
    for make in (np.ones, torch.ones):
        env.set_options([{"observation": make((2, 3)) / 2} for _ in range(2)])
        assert env.reset().tolist() == [[0.5] * 3] * 2
    env.set_options([{"observation": np.full((2, 3), i / 2)} for i in range(2)])
    with pytest.raises(ValueError, match="one dictionary for all"):
        env.reset()
