"""Scores: they add up, step by step and at the end, and planners heed them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from _points import point_env, points, SMALL
from hypothesis import given, settings, strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torchrl.envs import GymEnv
from torchrl.envs.custom.pendulum import PendulumEnv
from torchrl.modules import ValueOperator

from torchrl_wm import WorldModelEnv
from torchrl_wm.models import make_ensemble_world_model
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.planners import (
    ActionCost,
    CEMPlanner,
    DisagreementPenalty,
    GoalDistance,
    ICEMPlanner,
    MPPIPlanner,
    PredictedReward,
    StepScore,
    TrajectoryScore,
)

every_planner = pytest.mark.parametrize(
    "planner_class", [CEMPlanner, ICEMPlanner, MPPIPlanner]
)


class FirstLatent(StepScore):
    """The first number of the latent before the step: a score of a user's."""

    def __init__(self, **kwargs) -> None:
        super().__init__(["latent"], **kwargs)

    def step(self, step):
        return step["latent"][:, 0]


def far(trajectory: TensorDict) -> torch.Tensor:
    """How far the last point is: a score of a user's on whole trajectories."""
    mask = trajectory["collector", "mask"].unsqueeze(-1)
    return (trajectory["next", "latent"] * mask).sum((-1, -2)) - trajectory[
        "weight_of_row"
    ][..., -1]


SCORES = {
    "reward": PredictedReward(),
    "cost": ActionCost(),
    "goal": GoalDistance("latent", goal="goal"),
    "last goal": GoalDistance("latent", goal="goal", steps="last"),
    "own": FirstLatent(),
    "own at the end": FirstLatent(steps="last"),
    "function": TrajectoryScore(far),
}


def start(rows: int = 3) -> TensorDict:
    torch.manual_seed(0)
    other = {"goal": torch.randn(rows, 2), "weight_of_row": torch.randn(rows)}
    return points(rows, **other)


def judged(env, score, actions, state, **options) -> torch.Tensor:
    """What a planner says of actions ``[B, N, H, A]``."""
    numbers = {**SMALL, "planning_horizon": actions.shape[2]}
    planner = CEMPlanner(env, **numbers, score=score, **options)
    planner.plan(state)
    return planner.rate(
        planner.objective.start(state), planner.space.from_action(actions)
    )


def ends(point: torch.Tensor) -> torch.Tensor:
    return point[..., :1].abs() > 0.12


class TestValues:
    @settings(max_examples=40)
    @given(
        name=st.sampled_from(sorted(SCORES)),
        can_end=st.booleans(),
        limit=st.sampled_from([None, 2, 9]),
        discount=st.sampled_from([1.0, 0.9]),
    )
    def test_are_those_of_imagined_trajectories(
        self, name, can_end, limit, discount
    ) -> None:
        env = point_env(done=ends if can_end else None, max_steps=limit)
        state, actions = start(), torch.rand(3, 5, 4, 2) * 2 - 1
        found = judged(env, SCORES[name], actions, state, discount=discount)
        rows = state.unsqueeze(1).expand(3, 5)
        imagined = env.imagine(4, tensordict=rows, actions=actions)
        expected = SCORES[name](imagined, discount)
        assert found.shape == (3, 5) and len(found.unique()) > 1
        torch.testing.assert_close(found, expected)

    @settings(max_examples=30)
    @given(
        names=st.lists(st.sampled_from(sorted(SCORES)), min_size=1, max_size=4),
        weights=st.lists(st.integers(-3, 3), min_size=4, max_size=4),
        can_end=st.booleans(),
    )
    def test_add_up(self, names, weights, can_end) -> None:
        env = point_env(done=ends if can_end else None)
        state, actions = start(), torch.rand(3, 4, 3, 2) * 2 - 1
        parts = [judged(env, SCORES[name], actions, state) for name in names]
        expected = sum(w * part for w, part in zip(weights, parts))
        summands = [w * SCORES[name] for w, name in zip(weights, names)]
        for total in (sum(summands), summands):
            found = judged(env, total, actions, state)
            torch.testing.assert_close(found, expected)

    def test_operators(self) -> None:
        env, state = point_env(), start()
        actions = torch.rand(3, 4, 3, 2) * 2 - 1
        reward, cost = PredictedReward(), ActionCost()
        first, second, third = (
            judged(env, score, actions, state) for score in (reward, cost, far)
        )
        for score, expected in (
            (reward + far, first + third),
            (far + cost, third + second),
            (far - 2 * cost, third - 2 * second),
            (-(reward - cost), second - first),
            (0.5 * (reward + 2 * cost), 0.5 * first + second),
        ):
            found = judged(env, score, actions, state)
            torch.testing.assert_close(found, expected)

    def test_of_a_function_that_is_shown_no_notes_of_real_steps(self) -> None:
        seen = []

        def score(trajectory: TensorDict) -> torch.Tensor:
            seen.append(trajectory)
            return trajectory["action"].sum((-1, -2))

        state = start().update(
            {"observation": torch.zeros(3, 2), "is_init": torch.ones(3, 1)}
        )
        state["collector", "mask"] = torch.zeros(3, dtype=torch.bool)
        state["task", "goal"] = torch.zeros(3, 2)
        CEMPlanner(point_env(), **SMALL, score=score)(state)
        kept = {
            "latent",
            "action",
            "goal",
            "weight_of_row",
            "task",
            "next",
            "collector",
        }
        assert set(seen[0].keys()) == kept and seen[0]["collector", "mask"].all()
        assert seen[0]["task", "goal"].shape == (3, 12, 3, 2)

    def test_of_nothing_that_follows_an_end(self) -> None:
        def nan_after(point: torch.Tensor) -> torch.Tensor:
            return torch.where(point[..., :1] > 0.15, torch.nan, 1.0)

        env = point_env(reward=nan_after, done=lambda x: x[..., :1] > 0.05)
        found = judged(env, PredictedReward(), torch.ones(1, 2, 3, 2), points(1))
        assert torch.equal(found, torch.ones(1, 2))

    def test_beside_a_terminal_value(self) -> None:
        env, state = point_env(), start()
        actions = torch.rand(3, 4, 3, 2) * 2 - 1
        value = ValueOperator(nn.Linear(2, 1), in_keys=["latent"])
        rows = state.unsqueeze(1).expand(3, 4)
        last = env.imagine(3, tensordict=rows, actions=actions)["next", "latent"]
        expected = judged(env, ActionCost(), actions, state, discount=0.5)
        worth = value.module(last[:, :, -1]).squeeze(-1)
        found = judged(
            env, ActionCost(), actions, state, discount=0.5, terminal_value=value
        )
        torch.testing.assert_close(found, expected + 0.5**3 * worth)

    def test_a_value_may_read_the_goal(self) -> None:
        value = Mod(
            lambda goal, point: (goal - point).square().sum(-1, True),
            ["goal", "latent"],
            ["state_value"],
        )
        state, env = start(), point_env()
        actions = torch.zeros(3, 2, 3, 2)
        found = judged(env, 0.0 * ActionCost(), actions, state, terminal_value=value)
        expected = state["goal"].square().sum(-1, True).expand(3, 2)
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("name", ["policy", "terminal_value"])
    def test_observations_that_would_stand_still_are_not_read(self, name) -> None:
        key = "action" if name == "policy" else "state_value"
        reads = Mod(nn.Linear(2, 2), ["observation"], [key])
        planner = CEMPlanner(point_env(), **SMALL, **{name: reads})
        state = points(2, observation=torch.zeros(2, 2))
        with pytest.raises(MissingEntryError, match=r"\['observation'\]"):
            planner(state)

    def test_with_nested_keys(self) -> None:
        env = point_env(latent=("inner", "state"), action=("arm", "move"))
        state = TensorDict(
            {"inner": {"state": torch.zeros(2, 2)}, "task": {"goal": torch.ones(2, 2)}},
            [2],
        )
        score = GoalDistance(("inner", "state"), goal=("task", "goal")) + ActionCost(
            ("arm", "move")
        )
        planner = CEMPlanner(
            env,
            score=score,
            action_key=("arm", "move"),
            plan_key=("my", "plan"),
            **SMALL,
        )
        assert {("task", "goal"), ("inner", "state")} <= set(planner.in_keys)
        assert planner(state)["arm", "move"].shape == (2, 2)


class TestPlans:
    @every_planner
    def test_follow_the_score(self, planner_class) -> None:
        options = {"num_candidates": 64, "top_k": 8, "optim_steps": 6}
        # Away from the reward, but not far.
        score = -100 * PredictedReward()
        planner = planner_class(point_env(), planning_horizon=2, score=score, **options)
        assert (planner(points(4))["action"][:, 0] < -0.3).all()

    @every_planner
    def test_that_are_not_finite_lose(self, planner_class) -> None:
        def half_bad(trajectory: TensorDict) -> torch.Tensor:
            action = trajectory["action"][..., 0, 0]
            return torch.where(action > 0, torch.nan, action)

        planner = planner_class(
            point_env(),
            planning_horizon=1,
            optim_steps=8,
            num_candidates=64,
            top_k=32,
            score=half_bad,
        )
        action = planner(points(3))["action"][:, 0]
        assert (action <= 0).all() and (action > -0.3).all()

    def test_avoid_where_an_ensemble_disagrees(self) -> None:
        real = GymEnv("Pendulum-v1")
        model, _ = make_ensemble_world_model(real, members=3, hidden=(8,))
        planner = CEMPlanner(
            WorldModelEnv(model, real), **SMALL, score=DisagreementPenalty()
        )
        plan = planner.plan(real.reset())
        assert plan["predicted_return"].item() < 0

    def test_read_no_reward_where_no_score_does(self) -> None:
        calls = []

        def reward(point: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return point[..., :1]

        env = point_env(reward=reward)
        calls.clear()
        CEMPlanner(env, **SMALL, score=ActionCost())(points(1))
        assert not calls
        calls.clear()
        CEMPlanner(env, **SMALL)(points(1))
        assert len(calls) == SMALL["optim_steps"] * SMALL["planning_horizon"]

    def test_of_decoded_observations(self) -> None:
        env = point_env()
        env.world_model.decoder = Mod(lambda x: 2 * x, ["latent"], ["observation"])
        env = WorldModelEnv(env.world_model, env, decode=True)
        key = ("next", "observation")
        declared = TrajectoryScore(lambda t: t[key].sum((-1, -2)), in_keys=[key])
        for score in (declared, lambda t: t[key].sum((-1, -2))):
            plan = CEMPlanner(env, **SMALL, score=score).plan(points(2))
            rows = env.reset(points(2))
            imagined = env.imagine(3, tensordict=rows, actions=plan["actions"])
            expected = imagined[key].sum((-1, -2)).unsqueeze(-1)
            torch.testing.assert_close(plan["predicted_return"], expected)

    @pytest.mark.slow
    def test_compile(self) -> None:
        score = GoalDistance("latent", goal="goal", steps="last") + far - ActionCost()
        planner = CEMPlanner(
            point_env(done=ends), **SMALL, score=score, action_block=2, execute=2
        )
        torch.manual_seed(0)
        eager = planner.plan(start())
        torch.manual_seed(0)
        torch.testing.assert_close(planner.compile().plan(start()), eager)

    def test_in_an_env_that_is_no_model(self) -> None:
        env = PendulumEnv()
        state = env.reset(env.gen_params(batch_size=[3]), set_state=True)
        state["goal"] = torch.ones(3)
        score = GoalDistance("th", goal="goal") + ActionCost()

        def same(trajectory: TensorDict) -> torch.Tensor:
            off = (trajectory["next", "th"] - trajectory["goal"]).square()
            return -off.sum(-1) - trajectory["action"].square().sum((-1, -2))

        planners = [CEMPlanner(env, **SMALL, score=s) for s in (score, same)]
        plan = planners[0].plan(state)["actions"]
        samples = planners[0].space.from_action(plan).unsqueeze(1)
        planners[1].plan(state)
        torch.testing.assert_close(
            *(p.rate(p.objective.start(state), samples) for p in planners)
        )

    def test_particles_and_choices_of_members(self) -> None:
        real = GymEnv("Pendulum-v1")
        model, _ = make_ensemble_world_model(
            real, members=3, hidden=(8,), propagation="tsinf"
        )
        shapes = []

        def score(trajectory: TensorDict) -> torch.Tensor:
            shapes.append(trajectory.batch_size)
            return trajectory["next", "reward"].sum((-1, -2))

        planner = CEMPlanner(
            WorldModelEnv(model, real), **SMALL, num_particles=4, score=score
        )
        state = real.reset().unsqueeze(0).expand(2).clone()
        assert planner(state)["action"].shape == (2, 1)
        assert set(shapes) == {torch.Size([2, 12 * 4, 3])}

    def test_a_replaced_score_takes_effect(self) -> None:
        planner = CEMPlanner(point_env(), **SMALL, score=ActionCost())
        assert planner.plan(points(1))["predicted_return"].item() <= 0
        planner.score = lambda trajectory: 7 + 0 * trajectory["action"].sum((-1, -2))
        assert planner.plan(points(1))["predicted_return"].item() == 7

    def test_copies(self) -> None:
        state = start()
        planner = CEMPlanner(
            point_env(reward=Mod(nn.Linear(2, 1), ["a"], ["b"]).module),
            **SMALL,
            score=GoalDistance("latent", goal="goal") + ActionCost(),
        )
        planner(state.clone())
        others = [copy.deepcopy(planner)]
        planner.env.world_model.encoder = Mod(
            nn.Identity(), ["observation"], ["latent"]
        )
        for other in others:
            torch.manual_seed(0)
            expected = planner(state.clone())["action"]
            torch.manual_seed(0)
            assert torch.equal(other(state.clone())["action"], expected)
        score = pickle.loads(pickle.dumps(planner.score))
        assert score.in_keys == planner.score.in_keys

    def test_scores_of_networks_are_in_eval_mode(self) -> None:
        seen = []

        class Judge(nn.Module):
            def forward(self, trajectory):
                seen.append(self.training)
                return trajectory["action"].sum((-1, -2))

        planner = CEMPlanner(point_env(), **SMALL, score=Judge())
        planner(points(1))
        assert seen and not any(seen) and planner.score.training


class TestErrors:
    @pytest.mark.parametrize(
        ("score", "error", "message"),
        [
            (
                GoalDistance(goal="aim"),
                MissingEntryError,
                r"\['aim'\].*'latent'.*aim'\] =",
            ),
            (
                DisagreementPenalty(),
                MissingEntryError,
                "disagreement.*'next', 'latent'",
            ),
            (lambda t: t["x"], MissingEntryError, '"x" not found.*latent'),
            (lambda t: t["action"], ValueError, r"\(2, 12, 3, 2\).*\(2, 12\)"),
            (lambda t: 3.0, ValueError, r"a float.*\[B, N\]"),
        ],
    )
    def test_in_a_plan(self, score, error, message) -> None:
        with pytest.raises(error, match=message):
            CEMPlanner(point_env(), **SMALL, score=score)(points(2))

    def test_a_step_of_another_shape(self) -> None:
        class Wrong(FirstLatent):
            def step(self, step):
                return step["latent"]

        with pytest.raises(ValueError, match=r"Wrong.*\(24, 2\).*\[R\].*\(24,\)"):
            CEMPlanner(point_env(), **SMALL, score=Wrong())(points(2))

    @pytest.mark.parametrize(
        ("score", "error", "message"),
        [
            ("goal", TypeError, "got str"),
            ([], ValueError, "no scores"),
            ([ActionCost(), 3], TypeError, "got int"),
        ],
    )
    def test_at_construction(self, score, error, message) -> None:
        with pytest.raises(error, match=message):
            CEMPlanner(point_env(), **SMALL, score=score)

    def test_of_settings(self) -> None:
        with pytest.raises(ValueError, match="steps 'end'.*'last'"):
            FirstLatent(steps="end")
        with pytest.raises(ValueError, match="its own discount.*score"):
            MPPIPlanner(point_env(), nn.Identity(), score=ActionCost(), **SMALL)
        planner = MPPIPlanner(point_env(), nn.Identity(), **SMALL)
        for name, value in (("score", ActionCost()), ("discount", 0.9)):
            with pytest.raises(ValueError, match=f"its own discount.*{name}"):
                setattr(planner, name, value)
        planner.score = None
        planner.advantage_module = None
        planner.score = ActionCost()
        with pytest.raises(TypeError):
            ActionCost() * float("nan")
