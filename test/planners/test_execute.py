"""Acting on several actions of a plan, each held for a block of steps."""

from __future__ import annotations

import pytest
import torch
from _points import point_env, points, SMALL
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import OneHot
from torchrl.envs import (
    check_env_specs,
    GymEnv,
    InitTracker,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_wm import WorldModel, WorldModelEnv
from torchrl_wm.planners import (
    CEMPlanner,
    GoalDistance,
    GradientPlanner,
    ICEMPlanner,
    MPPIPlanner,
)

PLANNERS = [CEMPlanner, ICEMPlanner, MPPIPlanner, GradientPlanner]
every_planner = pytest.mark.parametrize("planner_class", PLANNERS)


def numbers(planner_class: type, **other) -> dict:
    out = {**SMALL, **other}
    if planner_class is GradientPlanner:
        del out["top_k"]
    return out


def count_searches(planner) -> list:
    """What is appended to whenever a search begins."""
    begun, begin = [], planner.begin
    planner.begin = lambda carried: begun.append(carried) or begin(carried)
    return begun


def steps_of(planner, state: TensorDict, number: int) -> list[TensorDict]:
    """What the planner writes in several steps, as an env hands it on."""
    made = []
    for _ in range(number):
        made.append(planner(state).clone())
        state = state.select("latent").update(made[-1]["next"])
    return made


@every_planner
@pytest.mark.parametrize("execute", [2, 3])
@pytest.mark.parametrize("block", [1, 2])
def test_actions_are_those_of_the_plan(planner_class, execute, block) -> None:
    planner = planner_class(
        point_env(), execute=execute, action_block=block, **numbers(planner_class)
    )
    searches, plans, choose = count_searches(planner), [], planner.choose
    planner.choose = lambda search: plans.append(choose(search)) or plans[-1]
    made = steps_of(planner, points(2), 2 * execute * block)
    assert len(searches) == 2
    expected = [
        planner.space.action(plan[:, i // block])
        for plan in plans
        for i in range(execute * block)
    ]
    for step, action in zip(made, expected):
        assert torch.equal(step["action"], action)
    assert len({tuple(a.flatten().tolist()) for a in expected}) == 2 * execute


@every_planner
def test_a_block_is_imagined(planner_class) -> None:
    calls = []
    env = point_env()
    env.world_model.dynamics.module.register_forward_hook(
        lambda *args: calls.append(args[1][1])
    )
    planner = planner_class(env, action_block=3, **numbers(planner_class))
    plan = planner.plan(points(1))
    assert plan["actions"].shape == (1, 3, 2)
    held = plan["actions"].repeat_interleave(3, 1)
    last = [action[0] for action in calls[-9:]]  # the plan is judged at the end
    assert torch.equal(torch.stack(last), held[0])
    imagined = env.imagine(9, tensordict=points(1), actions=held)
    torch.testing.assert_close(
        plan["predicted_return"], imagined["next", "reward"].sum(1)
    )


def test_a_policy_proposes_blocks() -> None:
    policy = Mod(lambda x: -x - 0.5, ["latent"], ["action"])
    planner = CEMPlanner(
        point_env(), policy=policy, num_policy_candidates=1, action_block=2, **SMALL
    )
    proposed = planner.plan(points(1))["candidates"][0, 1]
    first = torch.full((2,), -0.5)
    second = -(first * 0.1 * 2) - 0.5
    torch.testing.assert_close(proposed[:2], torch.stack([first, second]))


@every_planner
def test_rows_that_begin_anew_are_planned_at_once(planner_class) -> None:
    planner = planner_class(
        point_env(), execute=2, warm_start=True, **numbers(planner_class)
    )
    searches = count_searches(planner)
    first = planner(points(2)).clone()
    state = points(2).update(first["next"])
    state["is_init"] = torch.tensor([[True], [False]])
    second = planner(state.clone())
    assert len(searches) == 2
    assert second["next", "plan_step"].tolist() == [[1], [0]]
    taken, before = second["next", "plan_actions"], first["next", "plan_actions"]
    assert torch.equal(taken[1], before[1]) and not torch.equal(taken[0], before[0])
    assert torch.equal(second["next", "plan"][1], first["next", "plan"][1])
    assert not torch.equal(second["next", "plan"][0], first["next", "plan"][0])
    # And the plan that it began with was none.
    assert torch.equal(searches[1]["plan"][0], torch.zeros(3, 2))


@every_planner
def test_a_warm_start_moves_on_by_what_was_executed(planner_class) -> None:
    planner = planner_class(
        point_env(), execute=2, warm_start=True, **numbers(planner_class)
    )
    found, solve = [], planner._solve
    planner._solve = lambda *args: found.append(solve(*args)) or found[-1]
    searches = count_searches(planner)
    steps_of(planner, points(2), 4)
    plan = found[0][0].proposal.plan
    assert torch.equal(searches[1]["plan"][:, 0], plan[:, 2])
    assert torch.equal(searches[1]["plan"][:, 1:], torch.zeros(2, 2, 2))


def test_no_search_runs_for_a_plan_at_hand_and_the_env_is_not_encoded() -> None:
    env = point_env()
    planner = CEMPlanner(env, execute=2, **SMALL)
    seen = TensorDict({"observation": torch.zeros(2, 2)}, [2])
    planner(seen)
    calls = env.world_model.encoder.module.calls
    planner(seen.update(seen["next"]))
    assert env.world_model.encoder.module.calls == calls


def test_exploration_takes_several_steps() -> None:
    planner = MPPIPlanner(point_env(), execute=3, min_std=0.5, **SMALL)
    with set_exploration_type(ExplorationType.RANDOM):
        taken = planner(points(64))["next", "plan_actions"]
    assert taken.shape == (64, 3, 2) and (taken.std(0) > 0.2).all()


def test_choices() -> None:
    class Chosen(nn.Module):
        def forward(self, point, action):
            return point + action[..., :2].to(point.dtype)

    env = point_env(action_spec=OneHot(4), move=Chosen())
    planner = CEMPlanner(env, execute=2, **{**SMALL, "num_candidates": 64})
    for step in steps_of(planner, points(3), 4):
        assert OneHot(4).expand(3, 4).is_in(step["action"])
        assert step["action"][:, 0].all()  # which the reward is for


@pytest.mark.parametrize("warm_start", [None, False, True])
@pytest.mark.parametrize("plan_key", ["plan", ("search", "plan")])
def test_travels_through_envs_and_collectors(warm_start, plan_key) -> None:
    model = WorldModel(
        Mod(nn.Linear(3, 4), ["observation"], ["latent"]),
        Mod(lambda x, a: x + a, ["latent", "action"], [("next", "latent")]),
        Mod(nn.Linear(4, 1), [("next", "latent")], [("next", "reward")]),
    )
    planner = CEMPlanner(
        WorldModelEnv(model, GymEnv("Pendulum-v1")),
        execute=2,
        action_block=2,
        plan_key=plan_key,
        warm_start=warm_start,
        **SMALL,
    )
    step_key = planner.step_key
    env = TransformedEnv(SerialEnv(2, lambda: GymEnv("Pendulum-v1")), InitTracker())
    env.append_transform(StepCounter(6))
    env.append_transform(planner.make_tensordict_primer())
    check_env_specs(env)
    rollout = env.rollout(8, planner, break_when_any_done=False)
    # An episode of 6 steps: a plan of 4, and 2 of the next one; then another episode.
    assert rollout["next", step_key][0].flatten().tolist()[:8] == [
        1,
        2,
        3,
        0,
        1,
        2,
        1,
        2,
    ]
    for first, second in ((0, 1), (2, 3), (4, 5), (6, 7)):
        held = rollout["action"][:, [first, second]]
        assert torch.equal(held[:, 0], held[:, 1])
    collector = Collector(env, planner, frames_per_batch=12, total_frames=24)
    for batch in collector:
        assert (batch["next", step_key] != 0).any()
    collector.shutdown()


def test_in_a_plain_rollout() -> None:
    env = point_env()
    planner = CEMPlanner(env, execute=3, **SMALL)
    searches = count_searches(planner)
    env.rollout(6, planner, tensordict=points(2))
    assert len(searches) == 2


def test_a_cost_at_the_end_is_put_off_unless_plans_are_executed() -> None:
    # The goal is 4 steps away. The mean of plans that reach it in 8 goes half as fast: planned
    # anew after each step it never arrives.
    goal = torch.tensor([[0.4, 0.0], [-0.4, 0.2]])
    left = {}
    for execute in (1, 8):
        env = point_env()
        planner = CEMPlanner(
            env,
            planning_horizon=8,
            optim_steps=8,
            num_candidates=256,
            top_k=16,
            score=GoalDistance("latent", goal="goal", steps="last"),
            execute=execute,
        )
        state = points(2, goal=goal)
        last = env.rollout(8, planner, tensordict=state)["next", "latent"][:, -1]
        left[execute] = (last - goal).norm(dim=-1) / goal.norm(dim=-1)
    assert (left[8] < 0.1).all() and (left[1] > 0.2).all()


@every_planner
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"execute": 4}, "execute=4 of planning_horizon=3"),
        ({"execute": 0}, "execute must be a positive int, got 0"),
        ({"execute": 1.5}, "execute must be a positive int"),
        ({"action_block": -2}, "action_block must be a positive int, got -2"),
        ({"action_block": True}, "action_block must be a positive int"),
    ],
)
def test_numbers_that_make_no_sense(planner_class, option, message) -> None:
    with pytest.raises(ValueError, match=message):
        planner_class(point_env(), **numbers(planner_class), **option)


def test_a_horizon_set_later_is_checked() -> None:
    planner = CEMPlanner(point_env(), execute=3, **SMALL)
    planner.planning_horizon = 2
    with pytest.raises(ValueError, match="execute=3 of planning_horizon=2"):
        planner(points(2))


def test_actions_of_another_planner_are_refused() -> None:
    env = point_env()
    state = CEMPlanner(env, execute=3, **SMALL)(points(2))
    with pytest.raises(ValueError, match="'plan_actions'.*plan_key"):
        CEMPlanner(env, execute=2, **SMALL)(state)


def test_shorter_plans_from_now_on() -> None:
    """A plan that travels is given up where the new settings have fewer steps."""
    planner = CEMPlanner(point_env(), execute=2, action_block=3, **SMALL)
    made = steps_of(planner, points(2), 5)
    planner.action_block = 1
    following = points(2).select("latent").update(made[-1]["next"])
    assert planner(following)["action"].shape == (2, 2)


def test_what_travels_beside_the_plan_must_not_be_an_entry_of_the_env() -> None:
    env = point_env(latent="plan_step")
    with pytest.raises(ValueError, match="overwrite the entries.*'plan_step'"):
        CEMPlanner(env, execute=2, **SMALL)


def test_classes_and_unnamed_settings_are_refused() -> None:
    env = point_env()
    with pytest.raises(
        TypeError, match=r"is a class: give an instance, GoalDistance\("
    ):
        CEMPlanner(env, score=GoalDistance, **SMALL)
    with pytest.raises(TypeError, match="goal names the entry.*got Tensor"):
        GoalDistance(goal=torch.zeros(2))
    with pytest.raises(TypeError, match="positional"):
        GradientPlanner(env, 5, 3, 4, 2)
