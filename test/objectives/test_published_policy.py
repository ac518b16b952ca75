"""The policy that TorchRL's learners publish."""

from __future__ import annotations

import pickle

import pytest
from _models import make_model, SpecEnv, transitions
from torch import nn

from torchrl_wm import WorldModelEnv, WorldModelLoss
from torchrl_wm.planners import CEMPlanner


def planner_of(model, **keys) -> CEMPlanner:
    env = WorldModelEnv(model, SpecEnv(**{f"{k}_key": v for k, v in keys.items()}))
    settings = {"num_candidates": 4, "top_k": 2, "optim_steps": 1}
    reward = ("next", *env.reward_keys[0]) if keys else ("next", "reward")
    return CEMPlanner(env, planning_horizon=2, reward_key=reward, **settings)


NESTED = {"observation": ("agent", "seen"), "reward": ("agent", "reward")}


@pytest.mark.parametrize("keys", [{}, NESTED])
def test_it_stands_where_learners_look_and_is_no_part(keys) -> None:
    model = make_model(**keys)
    without, planner = WorldModelLoss(model), planner_of(model, **keys)
    loss = WorldModelLoss(model, policy=planner)
    assert loss.actor_network is planner
    assert getattr(without, "actor_network", None) is None
    names = [name for name, _ in loss.named_parameters()]
    assert names == [name for name, _ in without.named_parameters()]
    assert loss.state_dict().keys() == without.state_dict().keys()


def test_a_copy_publishes_what_it_trains() -> None:
    """As a learner gets it: pickled."""
    model = make_model()
    loss = WorldModelLoss(model, policy=planner_of(model))
    copy = pickle.loads(pickle.dumps(loss))
    published = {id(p) for p in copy.actor_network.parameters()}
    trained = {id(p) for p in copy.parameters()}
    assert trained == published and trained.isdisjoint(map(id, loss.parameters()))
    copy(transitions(4))["loss_reward"].backward()
    assert any(p.grad is not None for p in copy.actor_network.parameters())


def test_a_policy_of_another_model_is_an_error() -> None:
    with pytest.raises(ValueError, match="CEMPlanner, has none of the parameters"):
        WorldModelLoss(make_model(), policy=planner_of(make_model()))
    with pytest.raises(ValueError, match="Linear, has none"):
        WorldModelLoss(make_model(), policy=nn.Linear(1, 1))
