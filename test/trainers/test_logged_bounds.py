"""The bounds of logged actions: read off the data, given, and what acts between them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from tensordict import TensorDict
from torchrl.data import Bounded, Composite, OneHot

from torchrl_wm import GymWorldModelEnv, WorldModelEnv
from torchrl_wm.cli import main
from torchrl_wm.models import load_world_model, save_world_model
from torchrl_wm.planners import CEMPlanner
from torchrl_wm.trainers import load_transitions, RecordedEnv, train_world_model
from torchrl_wm.trainers.recipes.sac import make_sac

SMALL = {"steps": 4, "interval": 4, "members": 2, "hidden": (8,), "batch_size": 16}


def log(actions, key="action") -> TensorDict:
    """Transitions ``[N]`` with these actions, of two episodes."""
    actions = torch.as_tensor(np.asarray(actions))
    steps = len(actions)
    place = torch.linspace(0, 1, steps + 1).unsqueeze(-1).expand(-1, 2)
    done = torch.zeros(steps, 1, dtype=torch.bool)
    done[[steps // 2, -1]] = True
    return TensorDict(
        {
            "observation": place[:-1],
            key: actions,
            "next": {
                "observation": place[1:],
                "reward": place[1:, :1],
                "terminated": torch.zeros_like(done),
                "truncated": done,
                "done": done,
            },
        },
        batch_size=[steps],
    )


def bounds(actions, key="action", **settings) -> list[list[float]]:
    data = load_transitions(log(actions, key))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec = RecordedEnv(data, **settings).full_action_spec[key]
    assert isinstance(spec, Bounded) and spec.dtype is data[key].dtype
    assert spec.is_in(data[key])
    pair = torch.stack([spec.space.low, spec.space.high], -1)
    return [[round(value, 4) for value in dim] for dim in pair.reshape(-1, 2).tolist()]


def column(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


@pytest.mark.parametrize(
    "actions, expected",
    [
        (column(-1, 0.2, 1), [[-1, 1]]),
        (column(-0.99, 0.2, 0.985), [[-1, 1]]),  # near enough on both sides
        (column(-1.96, 1, 1.999), [[-2, 2]]),
        (column(0, 0.3, 0.5), [[0, 0.5]]),
        (column(-0.3, -0.1, 0), [[-0.3, 0]]),
        (column(-1, 0, 0.7), [[-1.085, 0.785]]),  # a margin of 5 % of 1.7
        (column(0.01, 0.3, 0.77), [[0, 0.808]]),  # which does not go beyond zero
        (column(-0.77, -0.01), [[-0.808, 0]]),
        (column(10, 20), [[9.5, 20.5]]),
        (column(0.5, 0.5), [[0.5, 0.5]]),
        (column(-1, np.nan, 1, np.inf), [[-1, 1]]),
    ],
)
@pytest.mark.parametrize("key", ["action", ("arm", "action")])
def test_bounds_are_read_off_the_data(actions, expected, key) -> None:
    data = torch.as_tensor(actions)
    if data.isfinite().all():
        assert bounds(actions, key) == expected
    else:
        with pytest.warns(UserWarning, match="from -1 to 1"):
            RecordedEnv(load_transitions(log(actions)))


def test_dims_between_the_bounds_of_most_have_the_same() -> None:
    rows = np.array([[-1, -1, -0.2, -3], [1, 1, 0.3, 4]], np.float32)
    assert bounds(rows) == [[-1, 1], [-1, 1], [-0.225, 0.325], [-3.35, 4.35]]
    assert bounds(rows[:, [0, 1, 2]]) == [[-1, 1]] * 3
    constant = np.array([[-1, -1, 0.5], [1, 1, 0.5]], np.float32)
    assert bounds(constant) == [[-1, 1], [-1, 1], [0.5, 0.5]]


@given(
    values=st.lists(
        st.tuples(*[st.floats(-1e6, 1e6, width=32)] * 2), min_size=2, max_size=9
    )
)
def test_all_data_lie_between_their_bounds(values) -> None:
    """And the bounds are no farther than a twentieth of the range."""
    actions = np.array(values, np.float32)
    pair = np.array(bounds_unrounded(actions))
    least, most = actions.min(0), actions.max(0)
    assert (pair[0] <= least).all() and (pair[1] >= most).all()
    slack = 0.0501 * (most - least) + 1e-6 * np.abs(actions).max(0)
    assert (least - pair[0] <= slack).all() and (pair[1] - most <= slack).all()


def bounds_unrounded(actions: np.ndarray) -> list:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec = RecordedEnv(load_transitions(log(actions))).action_spec
    return [spec.space.low.tolist(), spec.space.high.tolist()]


def test_a_warning_names_the_bounds() -> None:
    data = load_transitions(log(column(-1, 0, 0.7)))
    with pytest.warns(UserWarning, match=r"-1.085 to 0.785.*--action-bounds") as found:
        RecordedEnv(data)
    assert found[0].filename == __file__
    constant = load_transitions(log([[0.0, 0.5], [1.0, 0.5], [0.3, 0.5]]))
    with pytest.warns(UserWarning, match=r"Of the 2 dims \[1\] never change"):
        train_world_model(constant, **SMALL)


@pytest.mark.parametrize("key", ["action", ("arm", "action")])
def test_bounds_are_given(key, recwarn, tmp_path) -> None:
    source = log(np.random.default_rng(0).uniform(-0.7, 0.6, (40, 2)), key)
    pair = (-1, [1, 2])
    data = load_transitions(source, action_bounds=pair)
    env = RecordedEnv(data, action_bounds=pair)
    expected = Bounded(torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 2.0]))
    assert env.full_action_spec[key] == expected
    world_model, _ = train_world_model(source, action_bounds=pair, **SMALL)
    assert world_model.recipe.specs.actions[0].to_spec() == expected
    save_world_model(world_model, tmp_path / "model.pt")
    again = load_world_model(tmp_path / "model.pt")
    assert again.recipe.specs.reference_env().full_action_spec[key] == expected
    assert not [w for w in recwarn if "read off" in str(w.message)]


def test_integers_between_bounds_are_quantities() -> None:
    source = log(np.array([[-40, 3], [2, 90], [7, 7]]))
    data = load_transitions(source, action_bounds=(-100, 100))
    assert data["action"].dtype is torch.float32
    assert data["action"].tolist() == source["action"].tolist()
    env = RecordedEnv(data, action_bounds=(-100, 100))
    assert env.action_spec == Bounded(-100.0, 100.0, (2,))
    choices = load_transitions(log(np.eye(3, dtype=int)))
    with pytest.raises(ValueError, match=r"action_bounds says torch.float32 \(3,\)"):
        RecordedEnv(choices, action_bounds=(0, 1))


@pytest.mark.parametrize(
    "pair, message",
    [
        ((-1, 0.5), "lie between -1 and 0.5.*2 of 6 places.* row 1: .*clip"),
        ((1, -1), "the lower ones below the upper ones, got 1 and -1"),
        ((-1, np.inf), "must be finite"),
        (3, r"must be \(low, high\).*got 3"),
        ((-1, [1, 2, 3]), r"two of the shape \(2,\)"),
        (("a", "b"), r"must be \(low, high\)"),
    ],
)
def test_bounds_that_do_not_fit(pair, message) -> None:
    source = log([[0.0, 0.1], [0.2, 0.9], [1.0, -1.0]])
    with pytest.raises(ValueError, match=message):
        load_transitions(source, action_bounds=pair)


def test_one_says_what_the_actions_are() -> None:
    spec = Bounded(-1.0, 1.0, (1,))
    with pytest.raises(ValueError, match="Give one of env or action_spec or action_b"):
        load_transitions(log(column(0, 1)), action_spec=spec, action_bounds=(-1.0, 1.0))
    data = load_transitions(log(column(0, 1)))
    with pytest.raises(ValueError, match="got action_spec and action_bounds"):
        RecordedEnv(data, action_spec=spec, action_bounds=(-1.0, 1.0))


def test_actions_that_are_never_finite_are_named() -> None:
    data = load_transitions(log([[0.0, np.nan], [1.0, np.inf]]))
    with pytest.raises(ValueError, match=r"no finite value in the dims \[1\]"):
        RecordedEnv(data)


# What acts between them ------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """A model of actions from -2 to 2, and its data."""
    data = load_transitions(log(np.random.default_rng(0).uniform(-2, 2, (300, 1))))
    world_model, _ = train_world_model(data, seed=0, **SMALL)
    return world_model, data


@pytest.mark.filterwarnings("ignore:The bounds of the actions")
def test_policies_and_plans_act_between_them(trained) -> None:
    world_model, data = trained
    env = RecordedEnv(data)
    actor, _ = make_sac(
        env,
        ["observation"],
        hidden=(8,),
        alpha_init=0.1,
        gamma=0.99,
        device=torch.device("cpu"),
    )
    imagined_env = WorldModelEnv(world_model, env, start_states=data)
    imagined = imagined_env.rollout(5, actor)
    assert env.action_spec.is_in(imagined["action"])
    planner = CEMPlanner(
        imagined_env, planning_horizon=3, optim_steps=2, num_candidates=8, top_k=2
    )
    assert env.action_spec.is_in(planner(env.reset())["action"])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sac_of_stable_baselines_learns_in_a_model_of_them(trained) -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    world_model, data = trained
    env = WorldModelEnv(world_model, RecordedEnv(data), start_states=data, max_steps=10)
    gym_env = GymWorldModelEnv(env)
    assert gym_env.action_space.low == -2 and gym_env.action_space.high == 2
    sac = sb3.SAC("MlpPolicy", gym_env, learning_starts=8, batch_size=8, seed=0)
    sac.learn(20)
    action, _ = sac.predict(gym_env.reset()[0])
    assert gym_env.action_space.contains(action)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sac_needs_something_to_choose() -> None:
    settings = {"hidden": (8,), "alpha_init": 0.1, "gamma": 0.9}
    settings["device"] = torch.device("cpu")
    env = RecordedEnv(load_transitions(log([[0.0, 0.5], [1.0, 0.5]])))
    with pytest.raises(ValueError, match=r"nothing to choose in the dims \[1\]"):
        make_sac(env, ["observation"], **settings)
    spec = Composite(action=OneHot(2, dtype=torch.float32))
    choices = RecordedEnv(load_transitions(log(np.eye(2))), action_spec=spec)
    with pytest.raises(ValueError, match="needs continuous, bounded actions"):
        make_sac(choices, ["observation"], **settings)


# The command line --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, low, high",
    [
        (["-1,1"], [-1.0, -1.0], [1.0, 1.0]),
        (["-1,1", "0,2.5"], [-1.0, 0.0], [1.0, 2.5]),
    ],
)
def test_bounds_on_the_command_line(words, low, high, tmp_path, capsys) -> None:
    """A run that goes on has them, too."""
    pytest.importorskip("tyro")
    steps = 40
    np.savez(
        tmp_path / "log.npz",
        observations=np.random.default_rng(0).normal(size=(steps + 1, 2)),
        actions=np.random.default_rng(1).uniform(0, 0.7, (steps, 2)),
        rewards=np.zeros(steps),
        terminations=np.zeros(steps),
    )
    run = str(tmp_path / "run")
    options = ["--run", run, "--no-report", "--members", "2", "--hidden", "8"]
    options += ["--steps", "4", "--data", str(tmp_path / "log.npz")]
    assert main(["train", "model", *options, "--action-bounds", *words]) == 0
    assert main(["train", "--resume", run, "--steps", "6", "--no-report"]) == 0
    world_model = load_world_model(tmp_path / "run" / "model.pt")
    spec = world_model.recipe.specs.actions[0].to_spec()
    assert spec == Bounded(torch.tensor(low), torch.tensor(high))
    options[1] = str(tmp_path / "other")
    assert main(["train", "model", *options, "--action-bounds", "0,0.1"]) == 2
    assert "lie between 0 and 0.1 (action_bounds)" in capsys.readouterr().err
