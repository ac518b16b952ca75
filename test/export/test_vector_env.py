"""Many imagined envs as one batch: Gymnasium's vector API."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from _export_models import ACTED, ACTION_SPACE, Net, OBS_SPACE
from _models import (
    clock_env,
    clock_model,
    ends_at,
    imagined_env,
    make_model,
    observations,
    SpecEnv,
    times,
)
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from hypothesis import given, settings, strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torchrl.envs import GymEnv

from torchrl_wm import GymWorldModelEnv, GymWorldModelVectorEnv, WorldModelEnv


def clocks(*start: float, ends: float = 3.0, **kwargs) -> GymWorldModelVectorEnv:
    """Clocks that start at these times and end at another; one env for each."""
    model = clock_model(ends_at(ends))
    source = times(*start)
    env = WorldModelEnv(
        model,
        clock_env(),
        start_states=lambda size: source[: size.numel()].reshape(size),
    )
    return GymWorldModelVectorEnv(env, num_envs=len(start), **kwargs)


def nets(num_envs: int = 3, noise: float = 0.0, **kwargs) -> GymWorldModelVectorEnv:
    net = Net(noise, batch=(num_envs,))
    return GymWorldModelVectorEnv(
        net, OBS_SPACE, ACTION_SPACE, num_envs=num_envs, **kwargs
    )


def step(envs, times_: int = 1):
    for _ in range(times_):
        out = envs.step(np.zeros(envs.action_space.shape, np.float32))
    return out


def test_next_step():
    envs = clocks(0.0, 1.0)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert envs.reset()[0].tolist() == [[0], [1]]
    obs, reward, terminated, truncated, infos = step(envs, 2)
    assert obs.tolist() == [[2], [3]] and terminated.tolist() == [False, True]
    assert reward.dtype == np.float64 and reward.tolist() == [2, 3]
    obs, reward, terminated, _, infos = step(envs)
    # The second begins anew: from the first start, for its source gives rows from there.
    assert obs.tolist() == [[3], [0]] and reward.tolist() == [3, 0]
    assert terminated.tolist() == [True, False]
    assert infos["elapsed_steps"].tolist() == [3, 0]
    assert infos["model_state"]["latent"].tolist() == [[3], [0]]
    assert "final_obs" not in infos
    assert step(envs)[0].tolist() == [[0], [1]]


def test_same_step():
    envs = clocks(0.0, 1.0, autoreset_mode="SameStep")
    envs.reset()
    step(envs)
    obs, reward, terminated, truncated, infos = step(envs)
    assert obs.tolist() == [[2], [0]] and reward.tolist() == [2, 3]
    assert terminated.tolist() == [False, True] and not truncated.any()
    assert infos["_final_obs"].tolist() == [False, True]
    assert infos["final_obs"][0] is None and infos["final_obs"][1].tolist() == [3]
    assert infos["final_info"]["elapsed_steps"][1] == 2
    assert infos["final_info"]["model_state"]["latent"][1].tolist() == [3]
    assert infos["elapsed_steps"].tolist() == [2, 0]
    assert step(envs)[0].tolist() == [[0], [1]]


def test_disabled():
    envs = clocks(0.0, 1.0, autoreset_mode=AutoresetMode.DISABLED)
    envs.reset()
    step(envs, 2)
    with pytest.raises(RuntimeError, match="reset_mask"):
        step(envs)
    mask = np.array([False, True])
    options = {"reset_mask": mask}
    obs, infos = envs.reset(options=options)
    assert obs.tolist() == [[2], [0]] and infos["_elapsed_steps"].tolist() == [
        False,
        True,
    ]
    assert options["reset_mask"] is mask  # wrappers look for it afterwards
    assert step(envs)[0].tolist() == [[3], [1]]


@settings(max_examples=15)
@given(
    mode=st.sampled_from(["NextStep", "SameStep"]),
    limit=st.none() | st.integers(1, 4),
    ends=st.integers(2, 6),
    count=st.integers(1, 4),
)
def test_it_is_what_gymnasium_makes_of_single_envs(mode, limit, ends, count):
    """Against SyncVectorEnv over single envs, whose starts all are one state."""

    def source(size):
        return TensorDict({"observation": torch.ones(*size, 1)}, size)

    model = clock_model(ends_at(float(ends)))
    env = WorldModelEnv(model, clock_env(), start_states=source)
    single = SyncVectorEnv(
        [lambda: GymWorldModelEnv(env, max_episode_steps=limit)] * count,
        autoreset_mode=mode,
    )
    batch = GymWorldModelVectorEnv(
        env, num_envs=count, autoreset_mode=mode, max_episode_steps=limit
    )
    assert batch.observation_space == single.observation_space
    assert batch.action_space == single.action_space
    one, two = single.reset(seed=0), batch.reset(seed=0)
    for _ in range(8):
        assert len(one) == len(two)
        for a, b in zip(one[:-1], two[:-1]):
            assert np.array_equal(a, b) and a.dtype == b.dtype
        compare(one[-1], two[-1])
        one, two = step(single), step(batch)


def compare(expected, infos):
    assert expected.keys() == infos.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            compare(value, infos[key])
        elif value.dtype == object:
            assert [None if x is None else x.tolist() for x in value] == [
                None if x is None else x.tolist() for x in infos[key]
            ]
        else:
            assert np.array_equal(value, infos[key]), key


def test_one_model_call_for_each_step():
    calls = []

    def dynamics(latent, action):
        calls.append(latent.shape)
        return latent + 1

    model = clock_model(ends_at(3.0))
    model.dynamics = Mod(dynamics, ["latent", "action"], [("next", "latent")])
    env = WorldModelEnv(model, clock_env(), start_states=times(0.0, 1.0, 2.0))
    for mode in ("NextStep", "SameStep"):
        envs = GymWorldModelVectorEnv(env, num_envs=16, autoreset_mode=mode)
        envs.reset(seed=0)
        calls.clear()
        step(envs, 10)
        assert calls == [(16, 1)] * 10
    envs = nets(4, max_episode_steps=3)
    envs.reset()
    step(envs, 10)
    assert envs._source.model.calls == 10


def test_time_limits_are_each_envs_own():
    for mode in ("NextStep", "SameStep"):
        envs = clocks(0.0, 2.0, ends=3.0, max_episode_steps=2, autoreset_mode=mode)
        envs.reset()
        terminated, truncated = step(envs)[2:4]
        assert terminated.tolist() == [False, True] and not truncated.any()
        terminated, truncated = step(envs)[2:4]
        assert truncated.tolist() == [True, False] and not terminated.any()
    env = WorldModelEnv(
        clock_model(), clock_env(), start_states=times(0.0), max_steps=2
    )
    envs = GymWorldModelVectorEnv(env, num_envs=2, autoreset_mode="SameStep")
    envs.reset()
    flags = [step(envs)[3].tolist() for _ in range(4)]
    assert flags == [[False] * 2, [True] * 2] * 2


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
@pytest.mark.parametrize(
    "make",
    [
        lambda **k: nets(noise=0.5, **k),
        lambda **k: GymWorldModelVectorEnv(imagined_env(), num_envs=3, **k),
        lambda **k: GymWorldModelVectorEnv(
            WorldModelEnv(
                make_model(action_dim=1).cpu(),
                SpecEnv(action_spec=GymEnv("Pendulum-v1").action_spec),
                start_states=observations(5),
            ),
            num_envs=3,
            **k,
        ),
    ],
)
def test_seeds(make, mode):
    envs = make(max_episode_steps=3, autoreset_mode=mode)

    def run(seed):
        return str([envs.reset(seed=seed), *[step(envs) for _ in range(8)]])

    first, second = run(1), run(None)
    assert first != second
    assert (run(1), run(None)) == (first, second)
    assert run(2) != first
    assert run([1, 2, 3]) == run([1, 2, 3]) != run([1, 2, 4])


def test_a_real_env_as_source_repeats():
    real = GymEnv("Pendulum-v1")
    model = make_model(action_dim=1)
    model.encoder = Mod(torch.nn.Linear(3, 4), ["observation"], ["latent"])
    env = WorldModelEnv(model, real, start_states=real)
    for envs in (
        GymWorldModelVectorEnv(env, num_envs=2, max_episode_steps=2),
        GymWorldModelEnv(env),
    ):
        first, second = envs.reset(seed=0)[0], envs.reset()[0]
        assert not np.array_equal(first, second)
        real.reset()
        assert np.array_equal(envs.reset(seed=0)[0], first)
        assert np.array_equal(envs.reset()[0], second)


def test_rows_of_one_env_do_not_reach_the_others():
    env = imagined_env()
    envs = GymWorldModelVectorEnv(env, num_envs=4)
    start = torch.randn(4, 4)
    actions = (torch.rand(5, 4, 2) * 2 - 1).numpy()
    envs.reset(options={"state": start})
    batch = [envs.step(a)[0] for a in actions]
    single = GymWorldModelEnv(env)
    for i in range(4):
        single.reset(options={"state": start[i]})
        for t in range(5):
            assert np.allclose(single.step(actions[t, i])[0], batch[t][i], atol=1e-6)


def test_nothing_is_shared():
    for envs in (nets(), GymWorldModelVectorEnv(imagined_env(), num_envs=3)):
        obs, infos = envs.reset(seed=0)
        obs[:] = 1e6
        next_obs, reward, *_ = step(envs)
        assert np.abs(next_obs).max() < 1e3
        next_obs[:] = 1e6
        mask = np.array([True, False, False])
        state = envs.state
        again = envs.reset(options={"reset_mask": mask})[0]
        assert np.abs(again).max() < 1e3
        for leaf in state.values() if isinstance(state, dict) else [state]:
            assert not leaf.requires_grad
            leaf.fill_(1e6)
        assert np.abs(step(envs)[0]).max() < 1e3


def test_ended_states_are_not_stepped_on():
    """What a model says of an ended state may be anything."""

    def dynamics(latent, action):
        return torch.where(latent >= 3, torch.nan, latent + 1)

    model = clock_model(ends_at(3.0))
    model.dynamics = Mod(dynamics, ["latent", "action"], [("next", "latent")])
    env = WorldModelEnv(model, clock_env(), start_states=times(0.0))
    envs = GymWorldModelVectorEnv(env, num_envs=2)
    envs.reset()
    step(envs, 9)


def test_a_locked_env():
    env = WorldModelEnv(
        make_model(),
        SpecEnv(),
        batch_size=[3],
        start_states=observations(9),
        max_steps=2,
    )
    envs = GymWorldModelVectorEnv(env)
    assert envs.num_envs == 3
    envs.reset(seed=0)
    step(envs, 5)
    for count in (2, 4):
        with pytest.raises(ValueError, match="batch size"):
            GymWorldModelVectorEnv(env, num_envs=count)


def test_other_models_in_batches():
    step_form = {
        "transition_fn": lambda model, state, action: {
            "state": {"t": state["t"] + 1},
            "obs": state["t"].expand(-1, 3) + 1,
            "reward": state["t"],
            "done": state["t"][:, 0] >= 2,
        }
    }
    envs = GymWorldModelVectorEnv(
        object(),
        OBS_SPACE,
        ACTION_SPACE,
        num_envs=2,
        initial_state={"t": torch.zeros(1)},
        initial_observation=np.zeros(3),
        autoreset_mode="SameStep",
        **step_form,
    )
    assert envs.reset()[0].shape == (2, 3)
    out = step(envs, 3)
    assert out[2].all() and out[0].tolist() == [[0] * 3] * 2
    assert out[4]["final_obs"][0].tolist() == [3] * 3 and out[1].tolist() == [2, 2]


def test_dictionaries_and_discrete_actions():
    from torchrl.data import OneHot

    env = WorldModelEnv(
        make_model(decoder=True, action_dim=3),
        SpecEnv(action_spec=OneHot(3, dtype=torch.float32)),
        start_states=observations(4),
        decode=True,
    )
    wanted = spaces.Dict(
        {
            "latent": spaces.Box(-np.inf, np.inf, (4,)),
            "observation": spaces.Box(-np.inf, np.inf, (6,)),
        }
    )
    envs = GymWorldModelVectorEnv(
        env, wanted, num_envs=5, max_episode_steps=2, autoreset_mode="SameStep"
    )
    obs, _ = envs.reset(seed=0)
    assert envs.observation_space.contains(obs)
    for _ in range(4):
        obs, *_, infos = envs.step(envs.action_space.sample())
        assert envs.observation_space.contains(obs)
    assert wanted.contains(infos["final_obs"][2])
    with pytest.raises(ValueError, match="for each of 5 envs"):
        envs.step(np.array([0, 1, 2, 3, 0]))


def test_non_finite_rows_are_named():
    model = clock_model()
    model.dynamics = Mod(
        lambda latent, action: latent / latent,
        ["latent", "action"],
        [("next", "latent")],
    )
    env = WorldModelEnv(model, clock_env(), start_states=times(1.0, 1.0, 0.0))
    envs = GymWorldModelVectorEnv(env, num_envs=3)
    envs.reset(options={"state": torch.tensor([[1.0], [1.0], [0.0]])})
    with pytest.raises(FloatingPointError, match=re.escape("in env [2]")):
        step(envs)


def test_record_episode_statistics():
    for mode in ("NextStep", "SameStep"):
        envs = RecordEpisodeStatistics(clocks(0.0, 1.0, autoreset_mode=mode))
        envs.reset()
        infos = step(envs, 2)[-1]
        where = infos if "episode" in infos else infos["final_info"]
        assert where["_episode"].tolist() == [False, True]
        assert where["episode"]["r"][1] == 5 and where["episode"]["l"][1] == 2


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"num_envs": 0}, "num_envs"),
        ({"num_envs": 2.0}, "num_envs"),
        ({}, "num_envs"),
        ({"num_envs": 2, "autoreset_mode": "later"}, "autoreset_mode"),
        ({"num_envs": 2, "max_episode_steps": 0}, "max_episode_steps"),
        ({"num_envs": 2, "render_mode": "human"}, "render_mode"),
    ],
)
def test_arguments_that_mean_nothing(kwargs, words):
    with pytest.raises(ValueError, match=words):
        GymWorldModelVectorEnv(imagined_env(), **kwargs)


def test_unknown_arguments():
    with pytest.raises(TypeError, match="step_fn"):
        GymWorldModelVectorEnv(imagined_env(), num_envs=2, step_fn=abs)


def test_life_cycle_and_actions():
    envs = nets()
    with pytest.raises(RuntimeError, match=re.escape("Call reset() before step().")):
        step(envs)
    with pytest.raises(RuntimeError, match="all envs"):
        envs.reset(options={"reset_mask": np.ones(3, bool)})
    envs.reset()
    for action in (
        np.zeros((2, ACTED)),
        np.full((3, ACTED), 2.0),
        np.full((3, ACTED), np.nan),
    ):
        with pytest.raises(ValueError, match="for each of 3 envs"):
            envs.step(action)
    for mask in (np.zeros(3, bool), np.ones(2, bool), [True] * 3, np.ones(3)):
        with pytest.raises(ValueError, match="reset_mask"):
            envs.reset(options={"reset_mask": mask})
    for seeds in ([1, 2], [1, None, 2]):
        with pytest.raises(ValueError, match="seeds"):
            envs.reset(seed=seeds)
    assert envs.reset(seed=[None] * 3)[0].shape == (3, 3)
    envs.close()
    for call in (envs.reset, lambda: step(envs)):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_a_model_of_one_env_is_told():
    envs = GymWorldModelVectorEnv(Net(), OBS_SPACE, ACTION_SPACE, num_envs=3)
    with pytest.raises(ValueError, match="works on 3 rows at once"):
        envs.reset()


def test_memory_is_constant():
    import gc

    envs = nets(4, max_episode_steps=7, autoreset_mode="SameStep")
    envs.reset()

    def alive(steps):
        step(envs, steps)
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    before = alive(50)
    assert alive(1000) <= before
