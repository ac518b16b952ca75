"""Diagnostics of a model with a penalty: what is real has none."""

from __future__ import annotations

import pytest
import torch
from _diagnosed import line
from _models import ACTION, clock_env, SpecEnv, transitions
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torchrl.data import Composite, Unbounded

from torchrl_wm import WorldModel, WorldModelEnv
from torchrl_wm.diagnostics import (
    exploitation_gap,
    open_loop_error,
    policy_return,
    reward_error,
    termination_metrics,
    write_report,
)
from torchrl_wm.models import make_ensemble_world_model
from torchrl_wm.modules import fit_normalizers, with_penalty
from torchrl_wm.planners import CEMPlanner, PredictedReward

EPISODES = 40


def episodes() -> TensorDict:
    data = transitions(EPISODES)
    data["next", "observation"][:-1] = data["observation"][1:]
    for name in ("terminated", "truncated", "done"):
        data["next", name] = torch.zeros(EPISODES, 1, dtype=torch.bool)
    return data


def envs(declared: bool = False, **kwargs) -> tuple[WorldModelEnv, WorldModelEnv]:
    model, _ = make_ensemble_world_model(
        SpecEnv(), members=3, hidden=(8,), propagation="mean", **kwargs
    )
    fit_normalizers(model, episodes())
    careful = with_penalty(model, 2.0, limit=0.0, limit_reward=-50.0)
    spec = Composite(penalty=Unbounded((1,))) if declared else None
    plain = WorldModelEnv(model, SpecEnv())
    return plain, WorldModelEnv(careful, SpecEnv(), observation_spec=spec)


@pytest.mark.parametrize("declared", [False, True])
def test_rewards_and_ends_are_compared_without_it(declared) -> None:
    plain, careful = envs(declared)
    data = episodes()
    for measure in (
        lambda env: reward_error(env, data, 5),
        lambda env: open_loop_error(env, data, 5),
        lambda env: termination_metrics(env, data),
    ):
        torch.manual_seed(0)
        expected = measure(plain)
        torch.manual_seed(0)
        torch.testing.assert_close(
            measure(careful).to_dict(), expected.to_dict(), equal_nan=True
        )
    # Afterwards it pays again.
    out = careful.imagine(2, tensordict=data[:4].exclude("next"))["next"]
    assert (out["reward"] == -50).all() and out["terminated"].all()


def nothing(td):
    return td.set("action", torch.zeros(*td.batch_size, ACTION))


def test_the_gap_to_the_real_env_is_of_the_own_rewards() -> None:
    data, gaps = episodes(), []
    for env in envs():
        torch.manual_seed(0)
        gaps.append(exploitation_gap(env, nothing, data, 5).to_dict())
    torch.testing.assert_close(*gaps)


def test_a_planner_that_is_measured_plans_with_the_penalty() -> None:
    """The reward is the action, and any action above zero is doubted."""
    model = WorldModel(
        Mod(nn.Identity(), ["observation"], ["observation"]),
        Mod(
            lambda x, a: (x.clone(), a.clamp_min(0.0)),
            ["observation", "action"],
            [("next", "observation"), ("next", "doubt")],
        ),
        Mod(lambda a: a.clone(), ["action"], [("next", "reward")]),
    )
    env = WorldModelEnv(with_penalty(model, 3.0, measure="doubt"), clock_env())
    planner = CEMPlanner(env, 2, 4, 100, 10, score=PredictedReward(), warm_start=False)
    data = line(4, 1.0, ends=(3,))
    for measured in (
        exploitation_gap(env, planner, data, 3)["imagined_return"],
        policy_return(env, planner, data, 3, rollouts=2)["return"][:, -1],
    ):
        assert (measured.abs() < 0.6).all()  # without the penalty about 3


@pytest.mark.parametrize("penalised", [False, True])
def test_what_a_policy_cannot_read_is_named(penalised) -> None:
    policy = Mod(nn.Linear(3, ACTION), ["nowhere"], ["action"])
    with pytest.raises(
        KeyError, match=r"policy reads \['nowhere'\], which the imagined"
    ):
        policy_return(envs()[penalised], policy, episodes(), 3)


def test_each_reward_of_a_penalised_model_pays() -> None:
    """Two agents, and one doubt for both."""
    model = WorldModel(
        Mod(nn.Identity(), ["observation"], ["observation"]),
        Mod(
            lambda x, a: (x + 1, x.abs()),
            ["observation", "action"],
            [("next", "observation"), ("next", "doubt")],
        ),
        Mod(
            lambda x: torch.stack([x, -x], -2),
            [("next", "observation")],
            [("next", "agents", "reward")],
        ),
    )
    reference = clock_env()
    reference.reward_spec = Composite(agents=Composite(reward=Unbounded((2, 1))))
    env = WorldModelEnv(with_penalty(model, 3.0, measure="doubt"), reference)
    data = line(4, 1.0, ends=(3,))
    found = policy_return(env, nothing_to_clock, data, 3, gamma=0.5, rollouts=1)
    start = data[:1].select("observation")
    own = env.imagine(3, nothing_to_clock, start)["next", "agents", "reward"]
    paid = (own.sum((-2, -1)) * 0.5 ** torch.arange(3)).cumsum(-1)
    torch.testing.assert_close(found["penalised"], paid)
    assert (found["return"] == 0).all()


def nothing_to_clock(td):
    return td.set("action", torch.zeros(*td.batch_size, 1))


def test_a_limit_is_no_head_of_terminations() -> None:
    _, careful = envs(termination="none")
    with pytest.raises(ValueError, match="predicts no terminations"):
        termination_metrics(careful, episodes())


def test_a_report(tmp_path) -> None:
    numbers, data = [], episodes()
    for name, env in zip("ab", envs()):
        report = write_report(tmp_path / f"{name}.html", env, data, horizon=3)
        numbers.append({k: v for k, v in report.numbers.items() if v == v})
    assert numbers[0] == pytest.approx(numbers[1])
