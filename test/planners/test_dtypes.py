"""Planning where actions, latents and rewards are of different dtypes."""

from __future__ import annotations

import pytest
import torch
from _models import SpecEnv
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torchrl.data import Bounded, Categorical, Composite, OneHot, Unbounded

from torchrl_wm import WorldModel, WorldModelEnv
from torchrl_wm.planners import CEMPlanner, ICEMPlanner, MPPIPlanner

ACTIONS = {
    "half": Bounded(-1.0, 1.0, (2,), dtype=torch.float16),
    "bfloat16": Bounded(-1.0, 1.0, (2,), dtype=torch.bfloat16),
    "float": Bounded(-1.0, 1.0, (2,)),
    "double": Bounded(-1.0, 1.0, (2,), dtype=torch.float64),
    "categorical": Categorical(4),
    "one-hot": OneHot(4),
}
SMALL = {"planning_horizon": 3, "optim_steps": 3, "num_candidates": 20, "top_k": 4}


def env_of(action, reward: torch.dtype, key=("next", "reward")) -> WorldModelEnv:
    """An env whose latents and rewards are of the dtype ``reward``; high actions are good."""
    base = SpecEnv(action_spec=action, reward_key=key[1:])
    base.observation_spec = Composite(observation=Unbounded((3,), dtype=reward))
    rewards = Composite()
    rewards[key[1:]] = Unbounded((1,), dtype=reward)
    base.reward_spec = rewards
    dims = len(action.shape)

    def dynamics(latent: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        rows = action.float().unsqueeze(-1) if not dims else action.float()
        return rows.sum(-1, keepdim=True).expand_as(latent).to(latent.dtype)

    def judge(latent: torch.Tensor) -> torch.Tensor:
        return latent[..., :1] - 100_000  # no half has so many

    return WorldModelEnv(
        WorldModel(
            Mod(torch.clone, ["observation"], ["latent"]),
            Mod(dynamics, ["latent", "action"], [("next", "latent")]),
            Mod(judge, [("next", "latent")], [key]),
        ),
        base,
        batch_size=[],
    )


def start(dtype: torch.dtype) -> TensorDict:
    return TensorDict({"observation": torch.zeros(2, 3, dtype=dtype)}, [2])


@pytest.mark.parametrize("reward", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ACTIONS)
@pytest.mark.parametrize("planner_class", [CEMPlanner, ICEMPlanner, MPPIPlanner])
def test_actions_and_returns_of_two_dtypes(planner_class, kind, reward) -> None:
    action = ACTIONS[kind]
    for key in (("next", "reward"), ("next", "agent", "reward")):
        planner = planner_class(
            env_of(action, reward, key), reward_key=key, warm_start=True, **SMALL
        )
        acted = planner(planner(start(reward)))
        assert acted["action"].dtype == action.dtype
        assert action.expand(2, *action.shape).is_in(acted["action"])
        if kind not in ("categorical", "one-hot"):
            assert acted["plan"].dtype == action.dtype
        plan = planner.plan(start(reward))
        assert plan["predicted_return"].dtype == reward


@pytest.mark.parametrize("planner_class", [CEMPlanner, MPPIPlanner])
def test_low_returns_of_half_precision_plans_are_searched(planner_class) -> None:
    planner = planner_class(
        env_of(ACTIONS["half"], torch.float32), act_on="best", **SMALL
    )
    assert (planner(start(torch.float32))["action"] != 0).any()


def test_a_terminal_value_of_another_dtype() -> None:
    value = Mod(lambda x: x.double().sum(-1, True), ["latent"], ["state_value"])
    for planner_class in (CEMPlanner, ICEMPlanner, MPPIPlanner):
        planner = planner_class(
            env_of(ACTIONS["float"], torch.float32), terminal_value=value, **SMALL
        )
        assert planner(start(torch.float32))["action"].dtype == torch.float32
