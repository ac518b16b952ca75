"""What TorchRL 0.14.1's planners get wrong (1f), and ours must not.

Both plan in the same env, so that it is the planner that fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchrl.modules

import torchrl_wm.planners
from benchmarks.planning_quality import make_env
from tensordict import TensorDict
from torchrl.data import Bounded, OneHot
from torchrl.objectives.value import TDLambdaEstimator
from torchrl_wm import WorldModelEnv

START = TensorDict({"latent": torch.zeros(2, 1)}, [2])


@dataclass(frozen=True)
class Planners:
    """The planners of one implementation."""

    cem: type
    mppi: type


def fails_upstream(*raises: type[BaseException]) -> pytest.MarkDecorator:
    """Run a test on both: TorchRL must fail it, by one of ``raises``, ours must pass."""
    theirs = Planners(torchrl.modules.CEMPlanner, torchrl.modules.MPPIPlanner)
    ours = Planners(torchrl_wm.planners.CEMPlanner, torchrl_wm.planners.MPPIPlanner)
    mark = pytest.mark.xfail(strict=True, raises=raises, reason="TorchRL 0.14.1")
    return pytest.mark.parametrize(
        "impl",
        [
            pytest.param(theirs, marks=mark, id="torchrl"),
            pytest.param(ours, id="ours"),
        ],
    )


def target_env(spec: Any, best: float, scale: float = 1.0) -> WorldModelEnv:
    """Every action should be ``best``, whatever its dims."""

    def reward(latent, action, following):
        rows = action.float().reshape(*latent.shape[:-1], -1)
        return -scale * ((rows - best) ** 2).mean(-1, keepdim=True)

    return make_env(1, spec, lambda latent, action: latent, reward)


def plan(planner_class: type, env: WorldModelEnv, **options: Any) -> Any:
    torch.manual_seed(0)
    numbers = {"optim_steps": 8, "num_candidates": 128, "top_k": 16}
    planner = planner_class(env, planning_horizon=2, **{**numbers, **options})
    return planner(START.clone())


def mppi_advantage() -> TDLambdaEstimator:
    value = torchrl.modules.ValueOperator(torch.nn.Linear(1, 1), in_keys=["latent"])
    for parameter in value.parameters():
        torch.nn.init.zeros_(parameter)
    return TDLambdaEstimator(gamma=1.0, lmbda=1.0, value_network=value)


@fails_upstream(AssertionError)
def test_one_elite(impl: Planners) -> None:
    env = target_env(Bounded(-1.0, 1.0, (1,)), 0.5)
    action = plan(impl.cem, env, top_k=1)["action"]
    assert action.isfinite().all()


@fails_upstream(AssertionError)
def test_bounds_far_from_zero(impl: Planners) -> None:
    env = target_env(Bounded(100.0, 200.0, (1,)), 150.0)
    action = plan(impl.cem, env)["action"]
    assert ((action - 150).abs() < 5).all()


@fails_upstream(NotImplementedError, RuntimeError)
def test_choices(impl: Planners) -> None:
    def reward(latent, action, following):
        return action[..., 2:3].to(latent.dtype)

    env = make_env(1, OneHot(4), lambda latent, action: latent, reward)
    assert plan(impl.cem, env)["action"][..., 2].all()


@fails_upstream(RuntimeError)
def test_matrix_actions(impl: Planners) -> None:
    env = target_env(Bounded(-1.0, 1.0, (2, 3)), 0.5)
    action = plan(impl.cem, env)["action"]
    assert action.shape == (2, 2, 3) and ((action - 0.5).abs() < 0.3).all()


@fails_upstream(AttributeError)
def test_renamed_action(impl: Planners) -> None:
    base = target_env(Bounded(-1.0, 1.0, (1,)), 0.5)
    model = base.world_model
    for name in ("dynamics", "reward_head"):
        module = getattr(model, name)
        keys = ["move" if key == "action" else key for key in module.in_keys]
        setattr(model, name, type(module)(module.module, keys, module.out_keys))
    reference = target_env(Bounded(-1.0, 1.0, (1,)), 0.5)
    spec = reference.full_action_spec.clone()
    spec["move"] = spec["action"].clone()
    del spec["action"]
    reference.full_action_spec = spec
    env = WorldModelEnv(model, reference)
    action = plan(impl.cem, env, action_key="move")["move"]
    assert ((action - 0.5).abs() < 0.2).all()


@fails_upstream(AssertionError)
def test_large_returns(impl: Planners) -> None:
    def reward(latent, action, following):
        return 1e3 * (1 + action)

    env = make_env(1, Bounded(-1.0, 1.0, (1,)), lambda latent, action: latent, reward)
    acted = plan(impl.mppi, env, advantage_module=mppi_advantage(), temperature=1.0)
    assert acted["action"].isfinite().all()


@fails_upstream(TypeError)
def test_no_advantage_module(impl: Planners) -> None:
    env = target_env(Bounded(-1.0, 1.0, (1,)), 0.5)
    assert plan(impl.mppi, env)["action"].shape == (2, 1)


@fails_upstream(AssertionError)
def test_no_graph(impl: Planners) -> None:
    class Learned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))
            self.needed_grad: list[bool] = []

        def forward(self, latent, action):
            out = latent + self.weight * action
            self.needed_grad.append(out.requires_grad)
            return out

    dynamics = Learned()
    env = make_env(
        1,
        Bounded(-1.0, 1.0, (1,)),
        dynamics,
        lambda latent, action, following: -following.abs(),
    )
    dynamics.needed_grad.clear()
    plan(impl.cem, env)
    assert dynamics.needed_grad and not any(dynamics.needed_grad)


@fails_upstream(TypeError)
def test_the_last_plan_is_remembered(impl: Planners) -> None:
    env = target_env(Bounded(-1.0, 1.0, (1,)), 0.5)
    acted = plan(impl.cem, env, warm_start=True)
    again = plan(impl.cem, env, warm_start=True)
    assert torch.equal(acted["next", "plan"], again["next", "plan"])
    assert (acted["next", "plan"][:, 0] - 0.5).abs().max() < 0.2
