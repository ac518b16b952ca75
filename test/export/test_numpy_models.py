"""Models in numpy: what an action adapter gives reaches them as it is, in every form of env."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from tensordict import TensorDict
from torch import nn
from torchrl.envs import check_env_specs, GymWrapper

from torchrl_wm import (
    GymWorldModelEnv,
    GymWorldModelVectorEnv,
    make_env,
    make_world_model_env,
)

#: Where each action leads; float64, which a tensor of it would not be.
MOVES = np.array(
    [[1.0, 0.0, 9.0], [0.0, 0.25, 9.0], [-2.0, 1e-9, 9.0], [0.5, 3.0, 9.0]]
)
PLACE = spaces.Box(-np.inf, np.inf, (2,))
START = np.array([3.0, -1.0], np.float32)


class Walk:
    """Adds a row of a table to a place: numpy's own arithmetic, and its own methods."""

    def __init__(self) -> None:
        self.seen: list = []

    def nxt(self, place, move):
        self.seen.append(move)
        return (place + move[..., :2]).astype(np.float32)


def transition(model, state, action):
    place = model.nxt(state, action)
    return {
        "state": place,
        "observation": place,
        "reward": -np.abs(place).sum(-1),
        "terminated": (np.abs(place) > 50).any(-1),
    }


def walk(make=GymWorldModelEnv, model=None, **kwargs):
    settings = {
        "initial_state": START,
        "initial_observation": START,
        "action_transform_fn": lambda model, action: MOVES[int(action)],
        "transition_fn": transition,
        "max_episode_steps": 20,
        **kwargs,
    }
    return make(model or Walk(), PLACE, spaces.Discrete(4), **settings)


def place_after(*actions: int) -> np.ndarray:
    place = START
    for action in actions:
        place = (place + MOVES[action, :2]).astype(np.float32)
    return place


@pytest.mark.parametrize("make", [GymWorldModelEnv, make_env, make_world_model_env])
def test_a_table_of_actions(make) -> None:
    model = Walk()
    if make is GymWorldModelEnv:
        env = walk(make, model)
    else:
        env = walk(
            lambda m, o, a, **k: make(m, observation_space=o, action_space=a, **k),
            model,
        )
    env.reset(seed=0)
    for number, action in enumerate((1, 3, 2), 1):
        observation, reward, *_ = env.step(action)
        expected = place_after(*(1, 3, 2)[:number])
        assert np.array_equal(observation, expected)
        assert reward == pytest.approx(-np.abs(expected).sum())
    for move, action in zip(model.seen, (1, 3, 2)):
        assert type(move) is np.ndarray and move.dtype == np.float64
        assert np.array_equal(move, MOVES[action])


def test_a_table_of_actions_for_many_envs() -> None:
    model = Walk()
    envs = walk(
        GymWorldModelVectorEnv,
        model,
        num_envs=8,
        action_transform_fn=lambda model, actions: MOVES[np.asarray(actions)],
    )
    envs.reset(seed=0)
    actions = np.arange(8) % 4
    observations, rewards, *_ = envs.step(actions)
    expected = np.stack([place_after(action) for action in actions])
    assert np.array_equal(observations, expected)
    assert np.allclose(rewards, -np.abs(expected).sum(-1))
    assert type(model.seen[0]) is np.ndarray and model.seen[0].shape == (8, 3)
    singles = SyncVectorEnv([walk] * 8)
    singles.reset(seed=0)
    assert np.array_equal(singles.step(actions)[0], expected)


def test_torchrls_wrapper() -> None:
    env = GymWrapper(walk())
    check_env_specs(env)
    start = env.reset()
    start["action"] = torch.tensor([0, 0, 0, 1])
    following = env.step(start)["next", "observation"]
    assert np.array_equal(following, place_after(3))


def test_stable_baselines3() -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.env_checker import check_env

    from torchrl_wm.export import SB3VecEnv

    check_env(walk())
    batch = walk(
        SB3VecEnv,
        num_envs=2,
        action_transform_fn=lambda model, actions: MOVES[np.asarray(actions)],
    )
    for env in (walk(), batch):
        agent = sb3.PPO("MlpPolicy", env, n_steps=16, batch_size=16, n_epochs=1, seed=0)
        assert agent.learn(32).num_timesteps >= 32


def adapted(model, state, given, **kwargs):
    """What a transition gets where an adapter gives ``given``, for a step from ``state``."""
    seen = []

    def transition(model, state, action):
        seen.append(action)
        return state, np.zeros(2, np.float32), 0.0

    env = walk(
        model=model,
        initial_state=state,
        transition_fn=transition,
        action_transform_fn=lambda action: given,
        **kwargs,
    )
    env.reset(seed=0)
    env.step(0)
    return seen[0]


GIVEN = [
    "left",
    4.5,
    {"move": MOVES[1], "speed": (2, None)},
    [MOVES[0], MOVES[2]],
]


@pytest.mark.parametrize("state", [START, {"place": START, "clock": [0, 1.5]}, 7])
@pytest.mark.parametrize("given", GIVEN)
def test_whatever_an_adapter_gives_goes_on_as_it_is(state, given) -> None:
    assert adapted(Walk(), state, given) is given


@pytest.mark.parametrize(
    "model, state",
    [
        (nn.Linear(2, 2), START),
        (Walk(), torch.zeros(2)),
        (Walk(), {"clock": 0, "memory": [START, (torch.zeros(3),)]}),
        (Walk(), TensorDict({"latent": torch.zeros(2)})),
    ],
)
def test_a_model_in_torch_gets_tensors(model, state) -> None:
    got = adapted(model, state, {"move": MOVES[1], "speed": 2})
    assert got["move"].dtype == torch.float32 and got["speed"].dtype == torch.int64
    assert torch.equal(got["move"], torch.tensor([0.0, 0.25, 9.0]))
    given = {"move": MOVES[1], "speed": 2}
    assert adapted(model, state, given, torch_actions=False) is given
