"""Planning by gradients."""

from __future__ import annotations

import inspect

import pytest
import torch
from _points import point_env, points, STEP
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torchrl.data import Bounded, OneHot

from torchrl_wm.planners import ActionCost, GoalDistance, GradientPlanner, MPCPlanner

SMALL = {"planning_horizon": 3, "optim_steps": 4, "num_candidates": 4}
MORE = {"planning_horizon": 3, "optim_steps": 60, "num_candidates": 6}


def goal_planner(env, **options) -> GradientPlanner:
    return GradientPlanner(env, score=GoalDistance(goal="goal"), **{**MORE, **options})


def test_finds_the_best_plan() -> None:
    goal = torch.tensor([[0.05, -0.02], [0.08, 0.0], [-0.03, 0.1]])
    plan = goal_planner(point_env()).plan(points(3, goal=goal))
    torch.testing.assert_close(
        plan["predicted_return"], torch.zeros(3, 1), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(STEP * plan["actions"][:, 0], goal, atol=0.01, rtol=0)
    assert plan["iterations", "max_return"].shape == (3, 60)


@pytest.mark.parametrize(
    ("low", "high"),
    [(-1.0, 1.0), (-0.1, 0.3), ([100.0, -3.0], [200.0, -2.0])],
)
@pytest.mark.parametrize("action", ["action", ("arm", "move")])
def test_bounds_hold_and_do_not_hold_plans_back(low, high, action) -> None:
    low, high = (torch.as_tensor(x).expand(2).clone() for x in (low, high))
    spec = Bounded(low, high, (2,))

    class Take(nn.Module):
        def forward(self, point, action):
            return point + (action - low) / (high - low)

    env = point_env(action_spec=spec, action=action, move=Take())
    planner = goal_planner(env, action_key=action)
    # Three steps of the largest actions would lead to 3.
    plan = planner.plan(points(1, goal=torch.tensor([[9.0, -9.0]])))
    assert spec.expand(1, 3, 2).is_in(plan["actions"])
    expected = torch.stack([high[0], low[1]]).expand(1, 3, 2)
    torch.testing.assert_close(plan["actions"], expected)
    # A plan at the bounds comes back from there.
    planner = goal_planner(env, action_key=action, num_candidates=2, warm_start=True)
    state = points(1, goal=torch.tensor([[0.5, 0.5]]))
    state["plan"] = torch.tensor([1.0, -1.0]).expand(1, 3, 2).clone()
    assert planner.plan(state)["predicted_return"].item() > -1.0


def test_acts_on_the_best_of_all_that_it_judged() -> None:
    # Steps that are much too long: what follows the start is worse.
    planner = goal_planner(point_env(), learning_rate=100.0, optim_steps=5)
    seen = []
    state = points(2, goal=torch.zeros(2, 2))
    search, _, _ = planner._solve(state, seen.append)
    best = torch.stack([p.returns.amax(1) for p in seen]).amax(0)
    torch.testing.assert_close(search.best.returns[:, 0], best)
    assert torch.equal(planner.choose(search), search.best.samples[:, 0])


def test_a_policy_s_plan_is_a_start() -> None:
    policy = Mod(lambda x: torch.full_like(x, 0.7), ["latent"], ["action"])
    planner = GradientPlanner(
        point_env(),
        policy=policy,
        num_policy_candidates=2,
        **{**SMALL, "optim_steps": 1},
    )
    found = planner.plan(points(1))["candidates"][0]
    assert torch.equal(found[1], torch.full((3, 2), 0.7)) and len(found) == 4


def test_terminal_value_and_discount() -> None:
    value = Mod(lambda x: -x[..., 1:], ["latent"], ["state_value"])
    planner = GradientPlanner(
        point_env(),
        terminal_value=value,
        discount=0.9,
        score=0.1 * ActionCost(),
        **MORE,
    )
    action = planner(points(1))["action"][0]
    # By the derivative: -0.9 ** 3 * STEP = 0.2 * action.
    torch.testing.assert_close(
        action, torch.tensor([0.0, -(0.9**3) * STEP / 0.2]), atol=0.02, rtol=0
    )


def test_candidates_without_a_finite_return_lose_alone() -> None:
    def reward(point):
        return point[..., :1].masked_fill(point[..., :1] > 0.1, torch.nan)

    planner = GradientPlanner(point_env(reward=reward), **MORE)
    plan = planner.plan(points(2))
    assert (
        plan["predicted_return"].isfinite().all() and plan["actions"].isfinite().all()
    )
    assert (plan["predicted_return"] > 0).all()


def test_leaves_no_gradients_behind() -> None:
    env = point_env(reward=nn.Linear(2, 1))
    with torch.no_grad():
        acted = GradientPlanner(env, warm_start=True, execute=2, **SMALL)(points(2))
    for key in ("action", ("next", "plan"), ("next", "plan_actions")):
        assert not acted[key].requires_grad
    assert all(p.grad is None for p in env.world_model.parameters())


@pytest.mark.slow
def test_compiles() -> None:
    planner = goal_planner(point_env(), optim_steps=3)
    state = points(2, goal=torch.ones(2, 2))
    torch.manual_seed(0)
    eager = planner.plan(state)
    torch.manual_seed(0)
    torch.testing.assert_close(planner.compile().plan(state), eager)


class TestErrors:
    def test_choices(self) -> None:
        class Chosen(nn.Module):
            def forward(self, point, action):
                return point + action[..., :2].to(point.dtype)

        env = point_env(action_spec=OneHot(4), move=Chosen())
        with pytest.raises(TypeError, match="'action' is a choice.*CEMPlanner"):
            GradientPlanner(env, **SMALL)

    def test_a_step_without_a_gradient(self) -> None:
        class Rounds(nn.Module):
            def forward(self, point, action):
                return point + action.detach().round()

        planner = GradientPlanner(point_env(move=Rounds()), **SMALL)
        with pytest.raises(
            ValueError, match="no gradient by the action 'action'.*CEMPlanner"
        ):
            planner(points(2))

    @pytest.mark.parametrize("name", ["top_k", "momentum", "min_std", "act_on"])
    def test_what_only_samples_need(self, name) -> None:
        with pytest.raises(TypeError, match=name):
            GradientPlanner(point_env(), **SMALL, **{name: 1})
        assert name not in inspect.signature(GradientPlanner).parameters

    def test_learning_rate(self) -> None:
        with pytest.raises(ValueError, match="learning_rate"):
            GradientPlanner(point_env(), learning_rate=0, **SMALL)


def test_the_signature_names_all_arguments() -> None:
    own = inspect.signature(GradientPlanner).parameters
    base = inspect.signature(MPCPlanner).parameters
    assert set(base) - set(own) == {"top_k", "momentum", "min_std", "act_on"}
