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


# Infos ----------------------------------------------------------------------


class Talking:
    """Says when it is reset and when it steps; env ``i`` begins at ``i`` and ends at 3."""

    def reset(self, seed, options):
        count = options["num_envs"]
        state = np.arange(count, dtype=float)[:, None]
        return state, state, {"born": state[:, 0], "said": "begun", "nested": {"k": 1}}

    def step(self, state, action):
        state = state + 1
        info = {"said": ["on"] * len(state), "nested": {"k": state[:, 0]}, "scalar": 3}
        return state, state, state[:, 0], state[:, 0] >= 3, None, info


def talking(mode: str) -> GymWorldModelVectorEnv:
    return GymWorldModelVectorEnv(
        Talking(), B1, ACT, num_envs=2, autoreset_mode=mode, torch_actions=False
    )


ACTIONS = np.zeros((2, 1), np.float32)


def test_infos_are_rows():
    envs = talking("NextStep")
    _, infos = envs.reset(seed=0)
    assert infos["said"].tolist() == ["begun"] * 2 and infos["_said"].all()
    infos = envs.step(ACTIONS)[4]
    assert infos["scalar"].tolist() == [3, 3] and infos["said"].dtype == object
    assert infos["nested"]["k"].tolist() == [1, 2] and infos["nested"]["_k"].all()


@pytest.mark.parametrize("wrong", [[1, 2, 3], (1,), np.zeros(3)])
def test_infos_of_another_length(wrong):
    envs = GymWorldModelVectorEnv(
        Talking(),
        B1,
        ACT,
        num_envs=2,
        torch_actions=False,
        transition_fn=lambda state, action: {
            "state": state,
            "obs": state,
            "info": {"a": {"b": wrong}},
        },
    )
    envs.reset()
    with pytest.raises(ValueError, match=r"info\['a'\]\['b'\] has the length"):
        envs.step(ACTIONS)


def test_infos_of_episodes_that_begin_in_the_next_step():
    envs = talking("NextStep")
    envs.reset(seed=0)
    envs.step(ACTIONS)
    assert envs.step(ACTIONS)[2].tolist() == [False, True]
    infos = envs.step(ACTIONS)[4]
    assert infos["said"].tolist() == ["on", "begun"] and infos["_said"].all()
    assert infos["nested"]["k"].tolist() == [3, 1]
    assert infos["_born"].tolist() == [False, True] and infos["born"][1] == 1
    assert infos["_scalar"].tolist() == [True, False]


def test_infos_of_episodes_that_begin_in_the_same_step():
    envs = talking("SameStep")
    envs.reset(seed=0)
    envs.step(ACTIONS)
    infos = envs.step(ACTIONS)[4]
    final = infos["final_info"]
    assert infos["said"].tolist() == ["on", "begun"]
    assert infos["_born"].tolist() == [False, True]
    assert final["said"][1] == "on" and final["_said"].tolist() == [False, True]
    assert final["nested"]["k"][1] == 3 and infos["nested"]["k"].tolist() == [2, 1]
    final["nested"]["k"][:] = -1
    assert infos["nested"]["k"].tolist() == [2, 1]


def test_infos_reach_stable_baselines():
    pytest.importorskip("stable_baselines3")
    from torchrl_wm.export import SB3VecEnv

    envs = SB3VecEnv(talking("SameStep"))
    envs.reset()
    assert [info["born"] for info in envs.reset_infos] == [0, 1]
    infos = envs.step(ACTIONS)[3]
    assert [info["nested"]["k"] for info in infos] == [1, 2]
    envs.reset_infos[1] = {}
    infos = envs.step(ACTIONS)[3]
    assert [info["said"] for info in infos] == ["on", "on"]
    assert infos[1]["scalar"] == 3 and infos[1]["terminal_observation"].tolist() == [3]
    assert envs.reset_infos[1]["said"] == "begun" and "final_obs" not in infos[0]


# Ends -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "ends, terminated, truncated",
    [
        ({"terminated": False, "done": True}, False, True),
        ({"terminated": True, "done": True}, True, False),
        ({"terminated": False, "done": False}, False, False),
        ({"done": True}, True, False),
    ],
)
def test_done_beside_terminated(ends, terminated, truncated):
    env = doubled(
        transition_fn=lambda state, action: {"state": state, "obs": state, **ends}
    )
    env.reset()
    flags = env.step(ZERO)[2:4]
    assert flags == (terminated, truncated) and {type(flag) for flag in flags} == {bool}


def test_ends_that_contradict_each_other():
    ends = {"terminated": True, "done": False}
    env = doubled(
        transition_fn=lambda state, action: {"state": state, "obs": state, **ends}
    )
    env.reset()
    with pytest.raises(ValueError, match="Leave it out"):
        env.step(ZERO)


@pytest.mark.parametrize("limit", [True, False])
def test_time_limits_as_gym_had_them(limit):
    env = doubled(
        initial_observation=np.zeros(2),
        transition_fn=lambda state, action: (
            state,
            0.0,
            True,
            {"TimeLimit.truncated": limit},
        ),
    )
    env.reset()
    assert env.step(ZERO)[2:4] == (not limit, limit)


def test_pictures_do_not_change_what_comes_next():
    def noisy(state, action):
        state = torch.randn(2)
        return state, state, 0.0

    def draw(rng):
        return (torch.rand(4, 4, 3) * 255 * rng.random()).to(torch.uint8)

    def run(render: bool) -> list:
        env = doubled(transition_fn=noisy, render_mode="rgb_array", render_fn=draw)
        env.reset(seed=0)
        out = []
        for _ in range(3):
            out.append(env.step(ZERO)[0].tolist())
            if render:
                env.render()
        return out

    assert run(True) == run(False)


def test_modules_in_containers_are_in_evaluation_mode():
    class Held(Doubled):
        def __init__(self):
            self.nets = [torch.nn.Dropout(0.5), {"deep": (torch.nn.Dropout(0.5),)}]
            self.nets.append(self.nets)
            self.seen: list = []

        def step(self, state, action):
            self.seen.append((self.nets[0].training, self.nets[1]["deep"][0].training))
            return super().step(state, action)

    model = Held()
    env = doubled(model)
    env.reset()
    env.step(ZERO)
    assert model.seen == [(False, False)]
    assert model.nets[0].training and model.nets[1]["deep"][0].training


def test_actions_that_nothing_reads_are_not_checked():
    envs = talking("NextStep")
    envs.reset(seed=0)
    envs.step(ACTIONS)
    assert envs.step(ACTIONS)[2].tolist() == [False, True]
    outside = np.array([[0.0], [np.nan]], np.float32)
    assert envs.step(outside)[0][1] == 1
    envs = talking("NextStep")
    envs.reset(seed=0)
    envs.step(ACTIONS)
    envs.step(ACTIONS)
    for wrong in (outside[::-1], np.zeros((3, 1), np.float32), None):
        with pytest.raises((ValueError, TypeError), match="action"):
            envs.step(wrong)


def test_copies_of_envs_that_have_drawn():
    import copy

    pytest.importorskip("pygame")
    env = GymWorldModelEnv(
        object(),
        Box(-np.inf, np.inf, (3,)),
        ACT,
        initial_observation=np.array([1.0, 0.0, 0.0]),
        transition_fn=lambda state, action: (state, 0.0, False, {}),
        render_mode="rgb_array",
        render_env="Pendulum-v1",
    )
    env.reset()
    frame = env.render()
    assert np.array_equal(copy.deepcopy(env).render(), frame)
