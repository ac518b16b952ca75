"""Models of any make: what is bound, where episodes begin, and what must not pass silently."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from torchrl_wm import GymWorldModelEnv, GymWorldModelVectorEnv

B1 = Box(-np.inf, np.inf, (1,))
B2 = Box(-np.inf, np.inf, (2,))
ACT = Box(-1.0, 1.0, (1,))
ZERO = np.zeros(1, np.float32)


class Doubled:
    """A latent of the observation's size, that is half of it."""

    def reset(self):
        return torch.ones(2), 2 * torch.ones(2)

    def step(self, state, action):
        return state + 1, 2 * (state + 1), 0.0


def doubled(model=None, **kwargs) -> GymWorldModelEnv:
    return GymWorldModelEnv(model or Doubled(), B2, ACT, **kwargs)


# What functions take ---------------------------------------------------------


@pytest.mark.parametrize(
    "functions",
    [
        {"reward_fn": lambda s, a, s2: 0.0},
        {"reward_fn": lambda a, s, x, y: 0.0},
        {"terminal_fn": lambda o, a, x: False},
        {"transition_fn": lambda a, s, x: (s, s, 0.0)},
        {"transition_fn": lambda s, x: (s, s, 0.0)},
    ],
)
def test_letters_that_are_names_elsewhere(functions):
    with pytest.raises(TypeError, match="not clear.*called as.*Known are model: "):
        doubled(**functions)


def test_letters_in_a_row_are_places():
    env = doubled(transition_fn=lambda a, b, c: a.step(b, c))
    env.reset()
    assert env.step(ZERO)[0].tolist() == [4, 4]


@pytest.mark.parametrize("name", ["rng", "np_random"])
def test_random_numbers_for_every_function(name):
    functions = {
        "np_random": {
            "transition_fn": lambda state, action, np_random: {
                "state": state + np_random.normal(),
                "obs": state,
            },
            "reward_fn": lambda obs, np_random: np_random.normal(),
            "action_transform_fn": lambda np_random, action: action
            + np_random.normal(),
        },
        "rng": {
            "transition_fn": lambda state, action, rng: {
                "state": state + rng.normal(),
                "obs": state,
            },
            "reward_fn": lambda obs, rng: rng.normal(),
            "action_transform_fn": lambda rng, action: action + rng.normal(),
        },
    }
    env = doubled(**functions[name])
    env.reset(seed=0)
    first = [env.step(ZERO)[:2] for _ in range(3)]
    env.reset(seed=0)
    assert str(first) == str([env.step(ZERO)[:2] for _ in range(3)])
    assert len({reward for _, reward in first}) == 3


# The state and the observation ----------------------------------------------


def test_an_observation_does_not_take_the_place_of_a_state():
    env = doubled()
    env.reset()
    assert [env.step(ZERO)[0][0] for _ in range(3)] == [4, 6, 8]
    env = doubled(transition_fn=lambda state, action: (2 * (state + 1), 0.0, False, {}))
    env.reset()
    with pytest.raises(TypeError, match="returned none.*stand still"):
        env.step(ZERO)


def observing(**kwargs) -> GymWorldModelEnv:
    """The state is the observation."""
    return doubled(
        transition_fn=lambda state, action: (state + 1, 0.0, False, {}), **kwargs
    )


@pytest.mark.parametrize(
    "start",
    [{"initial_observation": np.zeros(2)}, {"reset_fn": lambda model: np.zeros(2)}],
)
@pytest.mark.parametrize("options", ["state", "observation", "both"])
def test_starts_of_a_model_whose_state_is_the_observation(start, options):
    env = observing(**start)
    given = np.full(2, 7.0)
    names = ["state", "observation"] if options == "both" else [options]
    assert env.reset(options={name: given for name in names})[0].tolist() == [7, 7]
    assert env.step(ZERO)[0].tolist() == [8, 8]
    env.reset()
    assert env.step(ZERO)[0].tolist() == [1, 1]


@pytest.mark.parametrize(
    "start",
    [{}, {"initial_state": torch.ones(2), "initial_observation": 2 * torch.ones(2)}],
)
def test_starts_of_a_model_with_a_latent(start):
    env = doubled(**start)
    latent, observation = torch.full((2,), 5.0), torch.full((2,), 10.0)
    with pytest.raises(ValueError, match="Pass the state, too"):
        env.reset(options={"observation": observation})
    with pytest.raises(ValueError, match="Pass that, too"):
        env.reset(options={"state": latent})
    both = {"state": latent, "observation": observation}
    assert env.reset(options=both)[0].tolist() == [10, 10]
    assert env.step(ZERO)[0].tolist() == [12, 12]


def test_starts_that_are_samples_are_each_envs_own():
    envs = GymWorldModelVectorEnv(
        Doubled(),
        Box(-1, 1, (2,)),
        ACT,
        num_envs=4,
        initial_state=torch.zeros(2),
    )
    with pytest.warns(UserWarning, match="sample"):
        observations, _ = envs.reset(seed=0)
    assert len(np.unique(observations[:, 0])) == 4
    with pytest.warns(UserWarning, match="sample"):
        assert np.array_equal(envs.reset(seed=0)[0], observations)


# A model that keeps its own state -------------------------------------------


class Own:
    """Counts its steps itself, for all envs."""

    def reset(self, seed=None, options=None):
        self.time = 0.0
        return np.zeros((options["num_envs"], 1))

    def step(self, action):
        self.time += 1
        return (
            np.full((len(action), 1), self.time),
            np.ones(len(action)),
            None,
            None,
            {},
        )


@pytest.mark.parametrize(
    "mode, expected",
    [("NextStep", [1, 2, 0, 1, 2, 0]), ("SameStep", [1, 0, 1, 0, 1, 0])],
)
def test_autoreset_of_a_model_that_keeps_its_own_state(mode, expected):
    envs = GymWorldModelVectorEnv(
        Own(), B1, ACT, num_envs=2, autoreset_mode=mode, max_episode_steps=2
    )
    envs.reset(seed=0)
    outs = [envs.step(np.zeros((2, 1), np.float32)) for _ in range(6)]
    assert [out[0][0, 0] for out in outs] == expected
    if mode == "NextStep":
        assert [out[1][1] for out in outs] == [1, 1, 0, 1, 1, 0]
        assert [bool(out[3][1]) for out in outs] == [False, True, False] * 2
        assert [out[4]["elapsed_steps"][0] for out in outs] == expected


# Forms ----------------------------------------------------------------------


@pytest.mark.parametrize("done", [True, np.False_, torch.tensor(True)])
def test_observation_reward_done_is_not_a_form(done):
    env = GymWorldModelEnv(
        object(),
        B1,
        ACT,
        initial_observation=np.zeros(1),
        transition_fn=lambda state, action: (state + 1, np.ones(1), done),
    )
    env.reset()
    with pytest.raises(
        TypeError, match=r"\(observation, reward, done\) is not accepted"
    ):
        env.step(ZERO)


@pytest.mark.parametrize("reward", [True, np.True_, torch.tensor(True)])
def test_rewards_are_not_flags(reward):
    env = doubled(
        transition_fn=lambda state, action: {"state": state, "obs": state},
        reward_fn=lambda obs: reward,
    )
    env.reset()
    with pytest.raises(ValueError, match="reward must be a number"):
        env.step(ZERO)
