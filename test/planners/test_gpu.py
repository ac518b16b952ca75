"""Planning on a GPU: nothing waits for the device."""

from __future__ import annotations

import pytest
import torch
from _models import make_model, observations, SpecEnv
from torchrl.data import OneHot

from torchrl_wm import WorldModelEnv
from torchrl_wm.planners import (
    ActionCost,
    CEMPlanner,
    GoalDistance,
    GradientPlanner,
    ICEMPlanner,
    MPPIPlanner,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("planner_class", [CEMPlanner, ICEMPlanner, MPPIPlanner])
@pytest.mark.parametrize("choice", [False, True])
def test_a_plan_never_waits_for_the_device(planner_class, choice) -> None:
    model = make_model(done="terminated_logits", action_dim=4 if choice else 2)
    spec = SpecEnv(action_spec=OneHot(4, dtype=torch.float32) if choice else None)
    env = WorldModelEnv(model.to("cuda"), spec)
    planner = planner_class(
        env,
        planning_horizon=3,
        optim_steps=2,
        num_candidates=32,
        top_k=4,
        warm_start=True,
    )
    start = model.encode(observations(5).to("cuda")).detach()
    acted = planner(start)
    torch.cuda.set_sync_debug_mode("error")
    try:
        acted = planner(acted)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert acted["action"].is_cuda and acted["next", "plan"].is_cuda


@pytest.mark.parametrize("planner_class", [CEMPlanner, GradientPlanner])
@pytest.mark.parametrize("goal", ["goal", {"observation": "goal_observation"}])
def test_goals_and_several_steps_of_a_plan(planner_class, goal) -> None:
    model = make_model(done="terminated_logits").to("cuda")
    planner = planner_class(
        WorldModelEnv(model, SpecEnv()),
        planning_horizon=3,
        optim_steps=2,
        num_candidates=32,
        **({"top_k": 4} if planner_class is CEMPlanner else {}),
        score=GoalDistance("latent", goal=goal, steps="last") + ActionCost(),
        execute=2,
        action_block=2,
    )
    state = model.encode(observations(5).to("cuda")).detach()
    state["goal"] = torch.randn(5, 4)  # a goal that the user left on the CPU
    state["goal_observation"] = torch.randn(5, 6)
    for number in (1, 2, 3, 0):
        state = planner(state)
        assert state["action"].is_cuda
        assert (state["plan_step"] == number).all()
