"""What a model says of its own doubts, in the infos of Gymnasium envs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _models import SpecEnv
from tensordict import TensorDict
from torchrl.data import Composite, Unbounded

from torchrl_wm import GymWorldModelEnv, GymWorldModelVectorEnv, WorldModelEnv
from torchrl_wm.models import make_ensemble_world_model
from torchrl_wm.modules import with_penalty, with_propagation
from torchrl_wm.modules.keys import join

OBS, ROWS = 3, 4


def imagined(change=lambda model: model, spec=None, nest=()) -> WorldModelEnv:
    key = join(*nest, "observation")
    env = SpecEnv(
        observation=OBS, observation_key=key, reward_key=join(*nest, "reward")
    )
    model, _ = make_ensemble_world_model(
        env, members=3, hidden=(8,), termination="none", propagation="mean"
    )
    starts = TensorDict({}, [20]).set(key, torch.randn(20, OBS))
    return WorldModelEnv(change(model), env, start_states=starts, observation_spec=spec)


@pytest.mark.parametrize("measure", ["disagreement", "deviation"])
def test_infos_of_one_env(measure) -> None:
    careful = imagined(lambda m: with_penalty(m, 2.0, measure=measure))
    env = GymWorldModelEnv(careful)
    observation, info = env.reset(seed=0)
    assert "penalty" not in info
    action = env.action_space.sample()
    _, reward, _, _, info = env.step(action)
    assert info["penalty"] == pytest.approx(2 * info[measure]) and info[measure] > 0
    assert info["penalty"].ndim == 0
    start = TensorDict(
        {
            "observation": torch.from_numpy(observation),
            "action": torch.from_numpy(action),
        }
    )
    out = careful.world_model.step(start)["next"]
    assert out["reward"].item() == pytest.approx(reward)
    assert out["penalty"].item() == pytest.approx(info["penalty"])


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_infos_of_many_envs(mode) -> None:
    careful = imagined(lambda m: with_penalty(m, 2.0))
    env = GymWorldModelVectorEnv(careful, num_envs=ROWS, autoreset_mode=mode)
    _, info = env.reset(seed=0)
    assert "penalty" not in info
    info = env.step(env.action_space.sample())[-1]
    assert info["_penalty"].all() and info["penalty"].shape == (ROWS,)
    np.testing.assert_allclose(info["penalty"], 2 * info["disagreement"])


def test_nested_rewards_have_nested_penalties() -> None:
    careful = imagined(lambda m: with_penalty(m, 2.0), nest=["group"])
    env = GymWorldModelEnv(careful)
    env.reset(seed=0)
    info = env.step(env.action_space.sample())[-1]
    assert info["group/penalty"] == pytest.approx(2 * info["disagreement"])


def test_rows_that_begin_anew_have_no_penalty() -> None:
    careful = imagined(lambda m: with_penalty(m, 2.0))
    env = GymWorldModelVectorEnv(careful, num_envs=ROWS, max_episode_steps=1)
    env.reset(seed=0)
    assert env.step(env.action_space.sample())[3].all()
    info = env.step(env.action_space.sample())[-1]
    assert not info["_penalty"].any() and not info["_disagreement"].any()


@pytest.mark.parametrize("rows", [None, ROWS])
def test_an_ensemble_without_penalty_tells_its_disagreement(rows) -> None:
    def infos(*args, **kwargs) -> dict:
        env = imagined(*args, **kwargs)
        gym = (
            GymWorldModelEnv(env)
            if rows is None
            else GymWorldModelVectorEnv(env, num_envs=rows)
        )
        gym.reset(seed=0)
        return gym.step(gym.action_space.sample())[-1]

    info = infos()
    assert np.all(info["disagreement"] > 0) and "penalty" not in info
    quick = infos(lambda m: with_propagation(m, "ts1", all_members=False))
    assert "disagreement" not in quick
    declared = infos(spec=Composite(loc=Unbounded((3, OBS + 1))))
    assert declared["loc"].shape == (*(() if rows is None else (rows,)), 3, OBS + 1)


@pytest.mark.parametrize("way", ["terminate", "truncate"])
def test_an_episode_ends_at_the_limit(way) -> None:
    careful = imagined(lambda m: with_penalty(m, 0.0, limit=0.0, on_limit=way))
    env = GymWorldModelEnv(careful)
    env.reset(seed=0)
    ended = env.step(env.action_space.sample())[2:4]
    assert ended == ((True, False) if way == "terminate" else (False, True))
