"""What a second reader of the planners found, kept from coming back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _models import linear, make_model, observations, SpecEnv
from benchmarks.planning_quality import make_env
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod, TensorDictSequential
from torch import nn
from torchrl.data import Bounded, OneHot
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal

from torchrl_wm import WorldModelEnv
from torchrl_wm.planners import CEMPlanner, ICEMPlanner, MPPIPlanner
from torchrl_wm.planners.env_objective import EnvObjective

SMALL = {"planning_horizon": 3, "optim_steps": 2, "num_candidates": 12, "top_k": 3}


def target_env(best: float = 1.5, **kwargs) -> WorldModelEnv:
    return make_env(
        1,
        Bounded(-2.0, 2.0, (1,)),
        lambda latent, action: latent,
        lambda latent, action, following: -((action - best) ** 2),
        **kwargs,
    )


def start(*size: int) -> TensorDict:
    return TensorDict({"latent": torch.zeros(*size, 1)}, size)


def constant(value: float) -> Mod:
    return Mod(lambda x: torch.full_like(x[..., :1], value), ["latent"], ["action"])


def test_more_shapes_than_dynamo_compiles_a_function_for() -> None:
    planner = ICEMPlanner(target_env(), 2, 10, 100, 5).compile(backend="eager")
    for rows in (1, 2):
        planner(start(rows))


@pytest.mark.parametrize("planner_class", [CEMPlanner, MPPIPlanner])
def test_a_proposal_of_nan_does_not_spread(planner_class) -> None:
    planner = planner_class(
        target_env(),
        policy=constant(torch.nan),
        num_policy_candidates=2,
        warm_start=True,
        **{**SMALL, "top_k": 12},
    )
    state = planner(planner(start(2)))
    assert state["action"].isfinite().all() and state["plan"].isfinite().all()


def test_a_policy_that_is_not_random_leaves_something_to_search() -> None:
    planner = CEMPlanner(target_env(), 4, 8, 200, 10, policy=constant(0.7))
    assert planner.plan(start(1))["predicted_return"].item() > -0.05


def test_a_policy_proposes_samples_in_evaluation_too() -> None:
    stats = nn.Sequential(nn.Linear(1, 2), NormalParamExtractor())
    policy = ProbabilisticActor(
        Mod(stats, ["latent"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
    )
    planner = CEMPlanner(target_env(), policy=policy, num_policy_candidates=5, **SMALL)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        proposed = planner.plan(start(1))["candidates"][0, 1:6, 0]
    assert len(proposed.unique()) == 5


def test_replaced_settings_take_effect() -> None:
    value = Mod(lambda x: 0 * x, ["latent"], ["state_value"])
    planner = CEMPlanner(
        target_env(),
        policy=constant(0.2),
        num_policy_candidates=1,
        terminal_value=value,
        **SMALL,
    )
    planner(start(1))
    planner.policy = constant(1.5)
    planner.terminal_value = Mod(lambda x: 1000 + 0 * x, ["latent"], ["state_value"])
    plan = planner.plan(start(1))
    torch.testing.assert_close(plan["candidates"][0, 1], torch.full((3, 1), 1.5))
    assert plan["predicted_return"].item() > 900


def test_envs_and_models_agree_on_endings() -> None:
    env = make_env(
        1,
        Bounded(-1.0, 1.0, (1,)),
        lambda latent, action: latent + 1,
        lambda latent, action, following: torch.ones_like(following),
        lambda following: following > 1,
    )
    value = Mod(lambda x: 10 * x, ["latent"], ["state_value"])
    for options in ({}, {"terminal_value": value, "discount": 0.5}):
        for limit in (None, 1):
            limited = WorldModelEnv(env.world_model, env, max_steps=limit)
            planner = CEMPlanner(limited, **SMALL, **options)
            actions = torch.zeros(2, 5, 3, 1)
            planner.plan(start(2))
            expected = planner.rate(planner.objective.start(start(2)), actions)
            planner.objective = EnvObjective(limited, "action")
            planner._update()
            state = limited.reset(start(2))
            found = planner.rate(planner.objective.start(state), actions)
            torch.testing.assert_close(found, expected)


def test_a_q_function_needs_a_policy_before_it() -> None:
    q = linear(["latent", "action"], ["state_action_value"], [2, 1])
    with pytest.raises(ValueError, match="TensorDictSequential"):
        CEMPlanner(target_env(), terminal_value=q, **SMALL)
    judged = TensorDictSequential(constant(0.0), q)
    CEMPlanner(target_env(), terminal_value=judged, **SMALL)(start(2))


def test_the_caller_s_tensors_stay_as_they_are() -> None:
    def in_place(latent, action):
        return latent.mul_(0.5).add_(1)

    env = make_env(
        1,
        Bounded(-1.0, 1.0, (1,)),
        in_place,
        lambda latent, action, following: following,
    )
    state = start(1)
    CEMPlanner(env, **SMALL).plan(state)
    assert state["latent"].item() == 0


def test_a_check_of_the_env_is_not_the_planner_s() -> None:
    env = target_env()
    env = WorldModelEnv(env.world_model, env, check_finite=True)
    env.world_model.reward_head = Mod(
        lambda action: action.log(), ["action"], [("next", "reward")]
    )
    assert CEMPlanner(env, **SMALL)(start(3))["action"].isfinite().all()


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda env: CEMPlanner(env, action_range=(-9, 9), **SMALL),
            ValueError,
            "out of the bounds",
        ),
        (
            lambda env: CEMPlanner(env, terminal_value=nn.Linear(1, 1), **SMALL),
            TypeError,
            "ValueOperator",
        ),
        (
            lambda env: CEMPlanner(
                env, policy=Mod(nn.Identity(), ["latent"], ["move"]), **SMALL
            ),
            ValueError,
            "'move'.*'action'",
        ),
        (
            lambda env: CEMPlanner(env, plan_key="latent", **SMALL),
            ValueError,
            r"plan_key='latent'.*overwrite.*'latent'",
        ),
        (
            lambda env: CEMPlanner(
                env, policy=constant(0.0), num_policy_candidates=-1, **SMALL
            ),
            ValueError,
            "num_policy_candidates=-1 must",
        ),
        (
            lambda env: MPPIPlanner(env, nn.Identity(), discount=0.5, **SMALL),
            ValueError,
            "its own discount",
        ),
    ],
)
def test_errors(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make(target_env())


def test_masked_choices_are_refused() -> None:
    spec = OneHot(3)
    spec.update_mask(torch.tensor([True, True, False]))
    env = SpecEnv(action_spec=spec)
    with pytest.raises(TypeError, match="mask"):
        CEMPlanner(WorldModelEnv(make_model(action_dim=3), env), **SMALL)


def test_keys_and_numbers_in_other_forms() -> None:

    env = WorldModelEnv(make_model(), SpecEnv())
    planner = CEMPlanner(
        env,
        np.int64(3),
        2,
        12,
        3,
        action_key=("action",),
        reward_key=("next", "reward"),
    )
    assert planner(env.world_model.encode(observations(2)))["action"].shape == (2, 2)


@pytest.mark.parametrize("encoded", [False, True])
def test_observations_under_autocast(encoded) -> None:
    env = WorldModelEnv(make_model(), SpecEnv())
    for planner_class in (CEMPlanner, ICEMPlanner, MPPIPlanner):
        planner = planner_class(env, **SMALL)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            state = observations(2)
            if encoded:
                state = env.world_model.encode(state)
            assert planner(state)["action"].dtype == torch.float32


@pytest.mark.parametrize(
    "low, high, fits",
    [
        ([0.0, 0.0], [torch.inf, torch.inf], [[0, 0], [9, 9]]),
        ([-1.0, -torch.inf], [1.0, torch.inf], [[-1, -9], [1, 9]]),
        ([-torch.inf] * 2, [1.0, torch.inf], [[-9, -9], [1, 9]]),
    ],
)
def test_ranges_heed_the_sides_that_are_bounded(low, high, fits) -> None:
    spec = Bounded(torch.tensor(low), torch.tensor(high), (2,))
    env = WorldModelEnv(make_model(), SpecEnv(action_spec=spec))
    with pytest.raises(ValueError, match="leads out of the bounds"):
        CEMPlanner(env, action_range=(-2, 2), **SMALL)
    planner = CEMPlanner(env, action_range=fits, **SMALL)
    acted = planner(env.world_model.encode(observations(50)))
    assert spec.expand(50, 2).is_in(acted["action"])


def test_another_env_takes_another_planner() -> None:
    planner = CEMPlanner(target_env(), **SMALL)
    with pytest.raises(AttributeError, match="make a new one"):
        planner.env = target_env(best=-1.5)
    planner.env = planner.env
    assert "env" not in planner._modules


@pytest.mark.parametrize("planner_class", [CEMPlanner, ICEMPlanner, MPPIPlanner])
def test_batches_of_no_rows_are_planned(planner_class) -> None:
    for kwargs in ({}, {"policy": constant(0.5)}, {"warm_start": True}):
        planner = planner_class(target_env(), **SMALL, **kwargs)
        for size in ((0,), (0, 2), (2, 0)):
            assert planner(start(*size))["action"].shape == (*size, 1)


@pytest.mark.parametrize("planner_class", [CEMPlanner, ICEMPlanner, MPPIPlanner])
def test_a_horizon_set_later(planner_class) -> None:
    planner = planner_class(target_env(), **SMALL)
    for horizon in (6, 1, 3):
        planner.planning_horizon = horizon
        assert planner.plan(start(2))["actions"].shape == (2, horizon, 1)


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"init_std": float("inf")}, ValueError, "init_std < inf"),
        ({"init_std": float("nan")}, ValueError, "init_std < inf"),
        ({"policy": 3}, TypeError, "policy must be .* got int"),
        ({"warm_start": "yes"}, ValueError, "warm_start must be .*'yes'"),
    ],
)
def test_settings_that_cannot_work(kwargs, error, message) -> None:
    for planner_class in (CEMPlanner, ICEMPlanner):
        with pytest.raises(error, match=message):
            planner_class(target_env(), **SMALL, **kwargs)
