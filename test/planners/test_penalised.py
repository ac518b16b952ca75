"""Planners in a model with a penalty: they plan with its reward, and end at its limit."""

from __future__ import annotations

import pytest
import torch
from _models import clock_env
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn

from torchrl_wm import WorldModel, WorldModelEnv
from torchrl_wm.modules import with_penalty
from torchrl_wm.planners import CEMPlanner, DisagreementPenalty, PredictedReward


def greedy_model(doubt="doubt") -> WorldModel:
    """The reward is the action; the model doubts what it does not know: actions above zero."""
    return WorldModel(
        Mod(nn.Identity(), ["observation"], ["observation"]),
        Mod(
            lambda x, a: (x.clone(), a.clamp_min(0.0)),
            ["observation", "action"],
            [("next", "observation"), ("next", doubt)],
        ),
        Mod(lambda a: a.clone(), ["action"], [("next", "reward")]),
    )


def planned(model, score=None) -> float:
    env = WorldModelEnv(model, clock_env())
    planner = CEMPlanner(
        env, 3, 5, 200, 20, score=score or PredictedReward(), warm_start=False
    )
    start = TensorDict({"observation": torch.zeros(1, 1)}, [1])
    return planner(start)["action"].mean().item()


@pytest.mark.parametrize("doubt", ["doubt", ("group", "doubt")])
def test_a_plan_pays(doubt) -> None:
    model = greedy_model(doubt)
    assert planned(model) > 0.8
    assert abs(planned(with_penalty(model, 3.0, measure=doubt))) < 0.2
    # The score alone says the same.
    score = PredictedReward() + 3.0 * DisagreementPenalty(doubt)
    assert abs(planned(model, score)) < 0.2


@pytest.mark.parametrize("way", ["terminate", "truncate"])
def test_a_plan_ends_at_the_limit(way) -> None:
    """A greedy step of 1 beyond the limit is worth less than three of 0.5 within it."""
    model = greedy_model()
    careful = with_penalty(model, 0.0, measure="doubt", limit=0.5, on_limit=way)
    assert 0.3 < planned(careful) <= 0.52


def test_a_plan_shuns_the_reward_of_the_limit() -> None:
    careful = with_penalty(
        greedy_model(), 0.0, measure="doubt", limit=0.1, limit_reward=-5.0
    )
    assert planned(careful) < 0.12
