"""Planners explore where they are told to, and plan in eval mode."""

from __future__ import annotations

import pytest
import torch
from _models import ACTION, LATENT, make_model, observations, SpecEnv
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Bounded, OneHot
from torchrl.envs import GymEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ValueOperator

from torchrl_wm import WorldModelEnv
from torchrl_wm.models import make_tdmpc2_world_model
from torchrl_wm.planners import CEMPlanner, ICEMPlanner, MPPIPlanner

SMALL = {"planning_horizon": 3, "optim_steps": 2, "num_candidates": 12, "top_k": 3}
SOME = {"num_candidates": 64, "top_k": 16, "planning_horizon": 2, "optim_steps": 3}


def acted(planner, start, exploration, seed=0) -> TensorDict:
    torch.manual_seed(seed)
    with set_exploration_type(exploration):
        return planner(start.clone())


def started(spec=None, key="action", rows=64) -> tuple[WorldModelEnv, TensorDict]:
    spec = Bounded(-1.0, 1.0, (ACTION,)) if spec is None else spec
    model = make_model(action=key)
    env = WorldModelEnv(model, SpecEnv(action_spec=spec, action_key=key))
    start = model.encode(observations(1)).detach().select("latent")
    return env, start.expand(rows).clone()


@pytest.mark.parametrize("quiet", [ExplorationType.MODE, ExplorationType.DETERMINISTIC])
def test_mppi_explores_only_under_random(quiet) -> None:
    env, start = started()
    planner = MPPIPlanner(env, **SOME, min_std=0.3)
    random = acted(planner, start, ExplorationType.RANDOM)["action"]
    mean = acted(planner, start, quiet)["action"]
    assert torch.equal(acted(planner, start, None)["action"], mean)
    # One of the elites, and the proposal's deviation around it.
    assert (random.std(0) > 0.25).all() and (mean.std(0) < random.std(0)).all()
    assert random.abs().max() <= 1
    torch.testing.assert_close(random.mean(0), mean.mean(0), atol=0.25, rtol=0)


def test_the_plan_that_travels_is_the_same() -> None:
    env, start = started()
    planner = MPPIPlanner(env, **SOME, warm_start=True)
    plans = [
        acted(planner, start, kind)["plan"]
        for kind in (ExplorationType.RANDOM, ExplorationType.MODE)
    ]
    assert torch.equal(*plans)


def test_bad_candidates_are_not_drawn() -> None:
    env, start = started()

    class Half(MPPIPlanner):
        def rate(self, state, samples):
            bad = samples[..., 0, 0] < 0
            return torch.where(bad, -torch.inf, 0.0)

    planner = Half(env, **{**SOME, "top_k": 60}, min_std=0.0)
    search, population, _ = planner._solve(start)
    planned = search.proposal._replace(spread=torch.zeros_like(search.proposal.spread))
    for _ in range(10):
        first = planner.explore(search._replace(proposal=planned), population)
        assert (first[:, 0, 0] >= 0).all()


def test_choices_are_those_of_elites() -> None:
    env, start = started(OneHot(ACTION))
    planner = MPPIPlanner(env, **SOME)
    action = acted(planner, start, ExplorationType.RANDOM)["action"]
    assert env.action_spec.expand(64, ACTION).is_in(action)


@pytest.mark.parametrize("kind", [CEMPlanner, ICEMPlanner])
def test_others_act_as_they_plan(kind) -> None:
    env, start = started(rows=4)
    planner = kind(env, **SMALL)
    actions = [
        acted(planner, start, how)["action"]
        for how in (ExplorationType.RANDOM, ExplorationType.MODE)
    ]
    assert torch.equal(*actions)


def test_nested_keys() -> None:
    env, start = started(key=("agent", "action"))
    planner = MPPIPlanner(env, action_key=("agent", "action"), **SMALL)
    action = acted(planner, start, ExplorationType.RANDOM)["agent", "action"]
    assert action.shape == (64, ACTION)


def test_in_a_collector() -> None:
    real = GymEnv("Pendulum-v1")
    model, _ = make_tdmpc2_world_model(real, latent_size=16, num_cells=16)
    planner = MPPIPlanner(WorldModelEnv(model, real), **SMALL, min_std=0.5)
    actions = []
    for kind in (ExplorationType.RANDOM, ExplorationType.MODE):
        collector = Collector(
            real, planner, frames_per_batch=6, total_frames=6, exploration_type=kind
        )
        collector.set_seed(0)
        torch.manual_seed(0)
        (batch,) = collector
        actions.append(batch["action"])
        collector.shutdown()
    assert not torch.equal(*actions)


class TestEvalMode:
    def planner(self, **kwargs) -> MPPIPlanner:
        env, _ = started()
        policy = Mod(
            nn.Sequential(nn.Linear(LATENT, ACTION), nn.Dropout(0.5), nn.Tanh()),
            ["latent"],
            ["action"],
        )
        value = ValueOperator(
            nn.Sequential(nn.Dropout(0.5), nn.Linear(LATENT, 1)), in_keys=["latent"]
        )
        return MPPIPlanner(env, **SMALL, policy=policy, terminal_value=value, **kwargs)

    def modes(self, planner) -> list[bool]:
        parts = [planner, planner.env.world_model]
        return [m.training for part in parts for m in part.modules()]

    @pytest.mark.parametrize("training", [True, False])
    def test_dropout_is_off_and_modes_come_back(self, training) -> None:
        planner = self.planner()
        planner.train(training)
        planner.env.world_model.train(training)
        planner.policy.module[1].train(True)  # a mode of its own
        before = self.modes(planner)
        _, start = started(rows=3)
        plan = acted(planner, start, None)["action"]
        seen = []
        planner.policy.module[1].register_forward_hook(
            lambda module, *_: seen.append(module.training)
        )
        planner.plan(start)
        assert seen and not any(seen)
        assert self.modes(planner) == before
        planner.policy.eval(), planner.terminal_value.eval()
        assert torch.equal(acted(planner, start, None)["action"], plan)

    def test_after_an_error(self) -> None:
        planner = self.planner()
        before = self.modes(planner)
        with pytest.raises(KeyError):
            planner(TensorDict({}, [2]))
        assert self.modes(planner) == before

    @pytest.mark.slow
    def test_in_compiled_plans(self) -> None:
        planner = self.planner()
        _, start = started(rows=3)
        eager = acted(planner, start, None)["action"]
        planner.compile()
        torch.testing.assert_close(acted(planner, start, None)["action"], eager)
        assert planner.policy.module[1].training
