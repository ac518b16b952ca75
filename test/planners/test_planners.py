"""Planners as policies: shapes, keys, plans that travel, endings, errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from _models import LATENT, linear, make_model, OBS, observations, SpecEnv
from benchmarks.planning_quality import cliff, make_env
from hypothesis import given, settings, strategies as st
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule as Sampling,
    TensorDictModule as Mod,
    TensorDictSequential,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.collectors import Collector
from torchrl.data import (
    Bounded,
    Categorical,
    Composite,
    MultiOneHot,
    OneHot,
    TensorSpec,
    Unbounded,
)
from torchrl.envs import (
    check_env_specs,
    GymEnv,
    InitTracker,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)
from torchrl.envs.custom.pendulum import PendulumEnv
from torchrl.modules import MLP, MPCPlannerBase, NormalParamExtractor, ValueOperator
from torchrl.modules.utils import get_primers_from_module
from torchrl.objectives.value import TDLambdaEstimator

from torchrl_wm import WorldModel, WorldModelEnv
from torchrl_wm.models import make_ensemble_world_model
from torchrl_wm.planners import CEMPlanner, ICEMPlanner, MPCPlanner, MPPIPlanner

SMALL = {"planning_horizon": 3, "optim_steps": 2, "num_candidates": 12, "top_k": 3}
PLANNERS = [CEMPlanner, ICEMPlanner, MPPIPlanner]
ACTIONS = {
    "bounded": lambda: Bounded(-1.0, 1.0, (2,)),
    "odd bounds": lambda: Bounded(
        torch.tensor([100.0, -3.0]), torch.tensor([200.0, -2.0]), (2,)
    ),
    "matrix": lambda: Bounded(-1.0, 2.0, (2, 3)),
    "scalar": lambda: Bounded(-1.0, 1.0, ()),
    "double": lambda: Bounded(-1.0, 1.0, (2,), dtype=torch.float64),
    "one-hot": lambda: OneHot(4),
    "categorical": lambda: Categorical(4),
    "categorical in a row": lambda: Categorical(4, (1,)),
    "several choices": lambda: Categorical(4, (3,)),
}
sizes = st.sampled_from([(), (1,), (3,), (2, 3)])
every_planner = pytest.mark.parametrize("planner_class", PLANNERS)


class TakesAnyAction(nn.Module):
    """Dynamics that sum up whatever the action is."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, latent: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        rows = action.reshape(*latent.shape[:-1], -1).to(latent.dtype)
        return 0.9 * latent + rows.mean(-1, keepdim=True)


def env_for(spec: TensorSpec, key="action") -> WorldModelEnv:
    model = WorldModel(
        Mod(nn.Linear(OBS, LATENT), ["observation"], ["latent"]),
        Mod(TakesAnyAction(len(spec.shape)), ["latent", key], [("next", "latent")]),
        linear([("next", "latent")], [("next", "reward")], [LATENT, 1]),
    )
    return WorldModelEnv(model, SpecEnv(action_spec=spec, action_key=key))


def small_env(**kwargs) -> WorldModelEnv:
    return WorldModelEnv(make_model(**kwargs), SpecEnv())


class TestActions:
    @settings(max_examples=60)
    @given(
        kind=st.sampled_from(sorted(ACTIONS)),
        size=sizes,
        key=st.sampled_from(["action", "move", ("agent", "action")]),
        planner_class=st.sampled_from(PLANNERS),
    )
    def test_are_in_the_spec_for_every_batch_shape(
        self, kind, size, key, planner_class
    ) -> None:
        spec = ACTIONS[kind]()
        env = env_for(spec, key)
        planner = planner_class(env, action_key=key, **SMALL)
        start = env.world_model.encode(observations(*size)).detach()
        before = start.clone()
        acted = planner(start)
        assert acted is start
        action = acted[key]
        assert action.shape == (*size, *spec.shape) and action.dtype == spec.dtype
        assert spec.expand(*size, *spec.shape).is_in(action)
        for name in ("observation", "latent"):
            assert torch.equal(acted[name], before[name])
        plan = planner.plan(before)
        assert plan.batch_size == torch.Size(size)
        assert plan["actions"].shape == (*size, 3, *spec.shape)

    @every_planner
    def test_rows_are_planned_each_for_itself(self, planner_class) -> None:
        # Each row has its own best action: what it starts from.
        env = make_env(
            1,
            Bounded(-1.0, 1.0, (1,)),
            lambda latent, action: latent,
            lambda latent, action, following: -((action - latent) ** 2),
        )
        wanted = torch.tensor([[-0.9, -0.3], [0.2, 0.8]]).unsqueeze(-1)
        start = TensorDict({"latent": wanted}, [2, 2])
        planner = planner_class(
            env,
            planning_horizon=2,
            optim_steps=12,
            num_candidates=256,
            top_k=16,
            **({"temperature": 50.0} if planner_class is MPPIPlanner else {}),
        )
        torch.testing.assert_close(planner(start)["action"], wanted, atol=0.05, rtol=0)

    @every_planner
    def test_action_range_bounds_unbounded_actions(self, planner_class) -> None:
        env = env_for(Unbounded((2,)))
        start = env.world_model.encode(observations(5))
        low, high = torch.tensor([5.0, -1.0]), torch.tensor([6.0, 1.0])
        planner = planner_class(env, action_range=(low, high), **SMALL)
        action = planner(start)["action"]
        assert (action >= low).all() and (action <= high).all()

    def test_a_policy_s_seed_repeats_it(self) -> None:
        env = small_env()
        start = env.world_model.encode(observations(4))
        actions = []
        for _ in range(2):
            torch.manual_seed(3)
            actions.append(CEMPlanner(env, **SMALL)(start.clone())["action"])
        assert torch.equal(*actions)


class TestReturns:
    def returns(self, env, actions, start, **options) -> torch.Tensor:
        """What a planner predicts for actions ``[B, N, H, A]``."""
        numbers = {**SMALL, "planning_horizon": actions.shape[2]}
        planner = CEMPlanner(env, **numbers, **options)
        planner._update()
        return planner.rate(
            planner.objective.start(start), planner.space.from_action(actions)
        )

    @settings(max_examples=30)
    @given(
        done=st.sampled_from([None, "terminated_logits", "continue_pred"]),
        limit=st.sampled_from([None, 2, 9]),
        discount=st.sampled_from([1.0, 0.9]),
        valued=st.booleans(),
    )
    def test_are_those_of_imagination(self, done, limit, discount, valued) -> None:
        env = WorldModelEnv(make_model(done=done), SpecEnv(), max_steps=limit)
        start = env.world_model.encode(observations(2)).detach()
        actions = torch.rand(2, 5, 4, 2) * 2 - 1
        value = ValueOperator(MLP(LATENT, 1, num_cells=[8]), in_keys=["latent"])
        options = {"terminal_value": value} if valued else {}
        found = self.returns(env, actions, start, discount=discount, **options)

        rows = start.unsqueeze(1).expand(2, 5)
        imagined = env.imagine(4, tensordict=rows, actions=actions)
        valid = imagined["collector", "mask"]
        scale = discount ** torch.arange(4.0)
        reward = imagined["next", "reward"].squeeze(-1)
        expected = (scale * reward * valid).sum(-1)
        if valued:
            # Where it ended, or at the horizon; a terminated episode is worth nothing.
            last = valid.sum(-1, keepdim=True) - 1
            ends = imagined["next"].select("latent", "terminated")
            ends = torch.gather(ends, 2, last.reshape(2, 5, 1)).squeeze(2)
            worth = value(ends)["state_value"].squeeze(-1)
            worth = worth * ~ends["terminated"].squeeze(-1)
            expected = expected + discount ** (last.squeeze(-1) + 1) * worth
        torch.testing.assert_close(found, expected)

    def test_nan_after_an_end_does_not_count(self) -> None:
        env = make_env(
            1,
            Bounded(-1.0, 1.0, (1,)),
            lambda latent, action: torch.where(latent > 0, torch.nan, latent + 1),
            lambda latent, action, following: following,
            lambda following: following > 0,
        )
        start = TensorDict({"latent": torch.zeros(1, 1)}, [1])
        found = self.returns(env, torch.zeros(1, 2, 3, 1), start)
        assert torch.equal(found, torch.ones(1, 2))

    @every_planner
    def test_candidates_that_are_not_finite_lose(self, planner_class) -> None:
        def reward(latent, action, following):
            return torch.where(action > 0, torch.nan, action)

        env = make_env(
            1, Bounded(-1.0, 1.0, (1,)), lambda latent, action: latent, reward
        )
        start = TensorDict({"latent": torch.zeros(3, 1)}, [3])
        planner = planner_class(
            env, planning_horizon=1, optim_steps=8, num_candidates=64, top_k=32
        )
        action = planner(start)["action"]
        assert (action <= 0).all() and (action > -0.3).all()

    @every_planner
    def test_all_candidates_lost_is_no_crash(self, planner_class) -> None:
        env = make_env(
            1,
            Bounded(-1.0, 1.0, (1,)),
            lambda latent, action: latent * torch.nan,
            lambda latent, action, following: following,
        )
        start = TensorDict({"latent": torch.zeros(3, 1)}, [3])
        acted = planner_class(env, warm_start=True, **SMALL)(start)
        assert torch.equal(acted["action"], torch.zeros(3, 1))
        assert acted["next", "plan"].isfinite().all()

    def test_particles_average_over_a_random_model(self) -> None:
        env = make_env(
            1,
            Bounded(-1.0, 1.0, (1,)),
            lambda latent, action: latent + torch.randn_like(latent),
            lambda latent, action, following: following,
        )
        start = TensorDict({"latent": torch.zeros(1, 1)}, [1])
        actions = torch.zeros(1, 50, 1, 1)
        one = self.returns(env, actions, start)
        many = self.returns(env, actions, start, num_particles=400)
        assert one.std() > 0.5 and many.std() < 0.1

    def test_each_trajectory_follows_a_member_of_its_own(self) -> None:
        real = GymEnv("Pendulum-v1")
        model, _ = make_ensemble_world_model(
            real, members=5, hidden=(8,), propagation="tsinf"
        )
        seen = []
        env = WorldModelEnv(model, real)
        planner = CEMPlanner(env, num_particles=4, **SMALL)
        stages = env.step_kernel.stages
        env.step_kernel.stages = lambda *args, **kwargs: [
            lambda values, at: seen.append(values["member"]),
            *stages(*args, **kwargs),
        ]
        assert real.rollout(2, planner)["action"].shape == (2, 1)
        assert seen[0].shape == (12 * 4,) and len(seen[0].unique()) == 5
        for step in range(3):  # and follows it to the horizon
            assert torch.equal(seen[step], seen[0])

    def test_of_several_agents_add_up(self) -> None:
        spec = SpecEnv(action_key=("agents", "action"), reward_key=("agents", "reward"))
        model = make_model(action=("agents", "action"), reward=("agents", "reward"))
        env = WorldModelEnv(model, spec)
        planner = CEMPlanner(
            env,
            reward_key=("next", "agents", "reward"),
            action_key=("agents", "action"),
            **SMALL,
        )
        acted = planner(model.encode(observations(3)))
        assert acted["agents", "action"].shape == (3, 2)

    def test_imagined_time_limits_end_them(self) -> None:
        env = make_env(
            1,
            Bounded(-1.0, 1.0, (1,)),
            lambda latent, action: latent,
            lambda latent, action, following: torch.ones_like(following),
        )
        env = WorldModelEnv(env.world_model, env, max_steps=5)
        state = env.reset(TensorDict({"latent": torch.zeros(1, 1)}, [1]))
        state["imagined_step"] += 3
        found = self.returns(env, torch.zeros(1, 1, 4, 1), state)
        assert found.item() == 2


class TestProposals:
    def env(self) -> WorldModelEnv:
        # Only one narrow sequence of actions pays.
        def reward(latent, action, following):
            near = ((action - latent).abs() < 0.02).all(-1, keepdim=True)
            return near.to(latent.dtype)

        return make_env(
            3, Bounded(-1.0, 1.0, (3,)), lambda latent, action: -latent, reward
        )

    @every_planner
    @pytest.mark.parametrize("known", [True, False])
    def test_a_policy_s_plan_is_found(self, planner_class, known) -> None:
        policy = Mod(nn.Identity(), ["latent"], ["action"])
        if not known:  # to the fast path
            policy.register_forward_hook(lambda *args: None)
        planner = planner_class(
            self.env(), policy=policy, num_policy_candidates=2, act_on="best", **SMALL
        )
        start = TensorDict({"latent": torch.rand(4, 3)}, [4])
        plan = planner.plan(start)
        assert torch.equal(plan["predicted_return"], torch.full((4, 1), 3.0))
        torch.testing.assert_close(plan["actions"][:, 0], start["latent"])
        assert not torch.equal(
            CEMPlanner(self.env(), act_on="best", **SMALL).plan(start)[
                "predicted_return"
            ],
            plan["predicted_return"],
        )

    def test_a_random_policy_proposes_different_plans(self) -> None:
        stats = nn.Sequential(nn.Linear(LATENT, 4), NormalParamExtractor())
        policy = TensorDictSequential(
            Mod(stats, ["latent"], ["loc", "scale"]),
            Sampling(
                ["loc", "scale"],
                ["action"],
                distribution_class=torch.distributions.Normal,
                default_interaction_type="random",
            ),
        )
        env = small_env()
        planner = CEMPlanner(env, policy=policy, num_policy_candidates=5, **SMALL)
        plan = planner.plan(env.world_model.encode(observations(1)))
        proposed = plan["candidates"][0, 1:6, 0]
        assert len(proposed.unique(dim=0)) == 5

    def test_of_choices(self) -> None:
        env = env_for(OneHot(4))
        always = Mod(
            lambda x: torch.eye(4, dtype=torch.bool)[2].expand(*x.shape[:-1], 4),
            ["latent"],
            ["action"],
        )
        planner = CEMPlanner(env, policy=always, num_policy_candidates=1, **SMALL)
        plan = planner.plan(env.world_model.encode(observations(2)))
        assert (plan["candidates"][:, 1].int().argmax(-1) == 2).all()


class TestWarmStart:
    @every_planner
    def test_the_plan_goes_on_moved_by_one_step(self, planner_class) -> None:
        env = cliff().env
        start = TensorDict({"latent": torch.zeros(2, 1)}, [2])
        planner = planner_class(
            env,
            planning_horizon=6,
            optim_steps=4,
            num_candidates=64,
            top_k=8,
            warm_start=True,
        )
        acted = planner(start)
        plan = acted["next", "plan"]
        assert plan.shape == (2, 6, 1)
        assert (plan[:, -1] == 0).all() and (plan[:, 0] != 0).all()
        assert torch.equal(acted["plan"], plan)

    @every_planner
    def test_saves_iterations(self, planner_class) -> None:
        env = cliff().env
        options = {"planning_horizon": 15, "num_candidates": 60, "top_k": 6}
        options["warm_start"] = True
        start = TensorDict({"latent": torch.zeros(8, 1)}, [8])
        cold = planner_class(env, optim_steps=1, **options)
        found = planner_class(env, optim_steps=12, **options)(start.clone())
        # The plan as it was before it was moved is what a search can begin with.
        warm = start.clone().set("plan", found["next", "plan"])
        better = cold.plan(warm)["predicted_return"]
        assert (better > cold.plan(start)["predicted_return"]).float().mean() > 0.8

    @every_planner
    def test_begins_anew_with_an_episode(self, planner_class) -> None:
        env = small_env()
        planner = planner_class(env, warm_start=True, **SMALL)
        start = env.world_model.encode(observations(2)).detach()
        acted = planner(start.clone())
        again = start.clone()
        for key in planner.carried_keys:
            again.set(key, acted["next"].get(key))
        again.set("is_init", torch.tensor([[True], [False]]))
        begun = planner.begin(planner.carried(again)).proposal.plan
        assert torch.equal(begun[0], torch.zeros(3, 2))
        assert torch.equal(begun[1], acted["next", "plan"][1])

    @every_planner
    def test_travels_through_envs_and_collectors(self, planner_class) -> None:
        model = WorldModel(
            Mod(nn.Linear(3, 4), ["observation"], ["latent"]),
            linear(["latent", "action"], [("next", "latent")], [5, 4]),
            linear([("next", "latent")], [("next", "reward")], [4, 1]),
        )
        planner = planner_class(
            WorldModelEnv(model, GymEnv("Pendulum-v1"), batch_size=[]), **SMALL
        )
        env = TransformedEnv(SerialEnv(2, lambda: GymEnv("Pendulum-v1")), InitTracker())
        env.append_transform(StepCounter(3))
        env.append_transform(planner.make_tensordict_primer())
        check_env_specs(env)
        rollout = env.rollout(6, planner, break_when_any_done=False)
        assert (rollout["plan"][:, [0, 3]] != 0).any()  # what was planned at the start
        assert torch.equal(rollout["plan"], rollout["next", "plan"])
        collector = Collector(env, planner, frames_per_batch=8, total_frames=16)
        for batch in collector:
            assert (batch["next", "plan"] != 0).any()
        collector.shutdown()
        primers = get_primers_from_module(
            TensorDictSequential(Mod(nn.Identity(), ["a"], ["b"]), planner)
        )
        assert set(primers.primers.keys()) == set(planner.carried_keys)

    def test_goes_on_where_the_env_knows_nothing_of_it(self) -> None:
        # In a plain rollout, too: the second step begins with the first one's plan.
        env, seen = small_env(), []
        planner = CEMPlanner(env, warm_start=True, **SMALL)
        begin = planner.begin
        planner.begin = lambda carried: seen.append(carried["plan"]) or begin(carried)
        rollout = env.rollout(
            4, planner, tensordict=env.world_model.encode(observations(2))
        )
        for step in range(1, 4):
            assert torch.equal(seen[step], rollout["next", "plan"][:, step - 1])

    def test_by_default_only_where_the_env_knows_the_plan(self) -> None:
        env = small_env()
        planner = CEMPlanner(env, **SMALL)
        start = env.world_model.encode(observations(2)).detach()
        assert set(planner(start.clone()).keys()) == {*start.keys(), "action"}
        primed = start.clone().set("plan", torch.zeros(2, 3, 2))
        assert planner(primed)["next", "plan"].shape == (2, 3, 2)

    def test_can_be_left_out(self) -> None:
        env = small_env()
        planner = CEMPlanner(env, warm_start=False, **SMALL)
        assert planner.out_keys == ["action"]
        acted = planner(env.world_model.encode(observations(2)))
        assert "next" not in acted.keys() and "plan" not in acted.keys()
        with pytest.raises(RuntimeError, match="warm_start=True"):
            planner.make_tensordict_primer()

    def test_nested_plan_key(self) -> None:
        env = small_env()
        planner = ICEMPlanner(
            env, plan_key=("search", "plan"), warm_start=True, **SMALL
        )
        acted = planner(env.world_model.encode(observations(2)))
        assert acted["next", "search", "plan"].shape == (2, 3, 2)
        assert acted["next", "search", "plan_elites"].shape == (2, 1, 3, 2)

    def test_a_plan_of_another_planner_is_refused(self) -> None:
        env = small_env()
        start = env.world_model.encode(observations(2))
        acted = CEMPlanner(env, warm_start=True, **SMALL)(start)
        with pytest.raises(ValueError, match=r"'plan'.*plan_key"):
            CEMPlanner(env, **{**SMALL, "planning_horizon": 4})(acted)


class TestStart:
    def test_from_observations(self) -> None:
        env = small_env()
        planner = CEMPlanner(env, **SMALL)
        seen = observations(4)
        torch.manual_seed(1)
        from_observations = planner(seen.clone())
        torch.manual_seed(1)
        from_latents = planner(env.world_model.encode(seen.clone()))
        assert torch.equal(from_observations["action"], from_latents["action"])
        # A latent left behind would be taken for the next step's.
        assert "latent" not in from_observations.keys()

    def test_recurrent_models_keep_their_latents_by_an_observer(self) -> None:
        class Dynamics(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.cell = nn.GRUCell(4, 8)
                self.head = nn.Linear(8, 3)

            def forward(self, latent, belief, action):
                rows = latent.shape[:-1]
                belief = self.cell(
                    torch.cat([latent, action], -1).reshape(-1, 4),
                    belief.reshape(-1, 8),
                ).reshape(*rows, 8)
                return self.head(belief), belief

        model = WorldModel(
            Mod(nn.Linear(3, 3), ["observation"], ["latent"]),
            Mod(
                Dynamics(),
                ["latent", "belief", "action"],
                [("next", "latent"), ("next", "belief")],
            ),
            linear([("next", "belief")], [("next", "reward")], [8, 1]),
            initial_state=TensorDict({"belief": torch.zeros(8)}),
        )
        real = TransformedEnv(GymEnv("Pendulum-v1"), InitTracker())
        planner = CEMPlanner(WorldModelEnv(model, GymEnv("Pendulum-v1")), **SMALL)
        with pytest.raises(KeyError, match=r"observer\(\)"):
            planner(real.reset())
        observer = model.observer()
        real.append_transform(observer.make_tensordict_primer(real.reset()))
        real.append_transform(planner.make_tensordict_primer())
        with torch.no_grad():
            rollout = real.rollout(5, TensorDictSequential(observer, planner))
        assert (rollout["belief"][1:] != 0).any() and (
            rollout["next", "plan"] != 0
        ).any()

    def test_a_missing_latent_is_named(self) -> None:
        env = small_env()
        with pytest.raises(KeyError, match=r"\['latent'\].*world_model.encode"):
            CEMPlanner(env, **SMALL)(TensorDict({"other": torch.zeros(2, 1)}, [2]))

    def test_a_latent_that_does_not_fit_is_named(self) -> None:
        env = small_env()
        wrong = TensorDict({"latent": torch.zeros(2, LATENT + 1)}, [2])
        with pytest.raises(ValueError, match=r"'latent'.*\(2, 4\)"):
            CEMPlanner(env, **SMALL)(wrong)

    def test_any_env_that_takes_every_batch_size(self) -> None:
        env = PendulumEnv()
        state = env.reset(env.gen_params(batch_size=[3]), set_state=True)
        value = Mod(lambda th: -th.abs().unsqueeze(-1), ["th"], ["state_value"])
        policy = Mod(lambda th: th.sign().unsqueeze(-1), ["th"], ["action"])
        planner = CEMPlanner(
            env, terminal_value=value, policy=policy, num_policy_candidates=2, **SMALL
        )
        assert planner(state.copy())["action"].shape == (3, 1)
        actions = planner.plan(state)["actions"]
        total = torch.zeros(3)
        for action in actions.unbind(1):
            step = env.step(state.copy().set("action", action))
            total += step["next", "reward"].squeeze(-1)
            state = env.step_mdp(step)
        expected = total - state["th"].abs()
        found = planner.rate(state, planner.space.from_action(actions).unsqueeze(1))
        assert found.shape == (3, 1) and expected.isfinite().all()

    def test_inside_a_transformed_env(self) -> None:
        env = TransformedEnv(small_env(), StepCounter())
        acted = CEMPlanner(env, **SMALL)(
            env.reset(
                env.base_env.world_model.encode(observations(2)).detach(),
                set_state=True,
            )
        )
        assert acted["action"].shape == (2, 2)


class HostSyncs(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal", "masked_select"):
            raise AssertionError(f"{name} waits for the device")
        return function(*args, **(kwargs or {}))


class TestCost:
    @every_planner
    @pytest.mark.parametrize("kind", ["bounded", "one-hot"])
    def test_no_graph_and_no_waiting_for_the_device(self, planner_class, kind) -> None:
        env = env_for(ACTIONS[kind]())
        start = env.world_model.encode(observations(2))
        planner = planner_class(env, warm_start=True, **SMALL)
        start["is_init"] = torch.ones(2, 1, dtype=torch.bool)
        assert start["latent"].requires_grad
        with HostSyncs():
            acted = planner(start)
        assert not acted["action"].requires_grad
        assert not acted["next", "plan"].requires_grad

    def test_the_model_is_called_once_a_step_for_all_candidates(self) -> None:
        env = small_env()
        calls = []
        env.world_model.dynamics.module.register_forward_hook(
            lambda *args: calls.append(args[1][0].shape[0])
        )
        CEMPlanner(env, **SMALL)(env.world_model.encode(observations(5)))
        assert calls == [5 * 12] * (2 * 3)

    def test_observations_are_not_decoded_for_nothing(self) -> None:
        decoded = []
        model = make_model(decoder=True)
        model.decoder.module.register_forward_hook(lambda *args: decoded.append(1))
        env = WorldModelEnv(model, SpecEnv(), decode=True)
        start = env.reset(observations(2))
        decoded.clear()
        CEMPlanner(env, **SMALL)(start.clone())
        assert not decoded
        value = ValueOperator(nn.Linear(OBS, 1), in_keys=["observation"])
        CEMPlanner(env, terminal_value=value, **SMALL)(start.clone())
        assert decoded

    @pytest.mark.parametrize(
        "planner_class",
        [MPPIPlanner]
        + [pytest.param(p, marks=pytest.mark.slow) for p in (CEMPlanner, ICEMPlanner)],
    )
    def test_compiles(self, planner_class) -> None:
        env = WorldModelEnv(make_model(done="terminated_logits"), SpecEnv())
        value = ValueOperator(nn.Linear(LATENT, 1), in_keys=["latent"])
        policy = linear(["latent"], ["action"], [LATENT, 2])
        planner = planner_class(
            env, terminal_value=value, policy=policy, **{**SMALL, "planning_horizon": 2}
        )
        start = env.world_model.encode(observations(2)).detach()
        torch.manual_seed(0)
        eager = planner.plan(start)
        assert planner.compile() is planner
        torch.manual_seed(0)
        compiled = planner.plan(start)
        torch.testing.assert_close(compiled, eager)
        assert planner.eager() is planner

    def test_other_envs_do_not_compile(self) -> None:
        with pytest.raises(TypeError, match="PendulumEnv"):
            CEMPlanner(PendulumEnv(), **SMALL).compile()


class TestModule:
    @every_planner
    def test_is_torchrl_s_planner(self, planner_class) -> None:
        planner = planner_class(small_env(), **SMALL)
        assert isinstance(planner, MPCPlannerBase) and isinstance(planner, MPCPlanner)
        assert planner.planning(observations(3)).shape == (3, 2)

    def test_positional_arguments_are_torchrl_s(self) -> None:
        env = small_env()
        reward = ("next", "reward")
        cem = CEMPlanner(env, 3, 2, 12, 4, reward, "action")
        mppi = MPPIPlanner(env, None, 0.5, 3, 2, 12, 4, reward, "action")
        for planner in (cem, mppi):
            assert (planner.planning_horizon, planner.optim_steps) == (3, 2)
            assert (planner.num_candidates, planner.top_k) == (12, 4)
        assert mppi.temperature == 0.5

    @every_planner
    def test_is_copied_and_pickled(self, planner_class) -> None:
        env = WorldModelEnv(make_model(), SpecEnv())
        planner = planner_class(env, **SMALL)
        start = env.world_model.encode(observations(2)).detach()
        planner(start.clone())
        for other in (copy.deepcopy(planner), pickle.loads(pickle.dumps(planner))):
            torch.manual_seed(0)
            expected = planner(start.clone())["action"]
            torch.manual_seed(0)
            assert torch.equal(other(start.clone())["action"], expected)

    def test_each_tensor_stands_once_in_its_state(self) -> None:
        env = small_env()
        planner = CEMPlanner(env, **SMALL)
        assert len(planner.state_dict()) == len(env.world_model.state_dict())

    def test_a_replaced_component_takes_effect(self) -> None:
        env = small_env()
        planner = CEMPlanner(env, **SMALL)
        start = env.world_model.encode(observations(1)).detach()
        planner(start.clone())
        env.world_model.reward_head = Mod(
            lambda x: 7 + 0 * x[..., :1], [("next", "latent")], [("next", "reward")]
        )
        assert planner.plan(start)["predicted_return"].item() == 21

    def test_an_advantage_module_judges_whole_trajectories(self) -> None:
        env = small_env(done="terminated_logits")
        value = ValueOperator(nn.Linear(LATENT, 1), in_keys=["latent"])
        advantage = TDLambdaEstimator(gamma=0.9, lmbda=0.9, value_network=value)
        planner = MPPIPlanner(env, advantage, 1.0, 3, 2, 12, 4)
        start = env.world_model.encode(observations(2)).detach()
        assert planner(start.clone())["action"].shape == (2, 2)
        plan = planner.plan(start)
        rows = start.unsqueeze(1).expand(2, 12)
        imagined = env.imagine(3, tensordict=rows, actions=plan["candidates"])
        mask = imagined["collector", "mask"].unsqueeze(-1)
        imagined["next", "reward"] = imagined["next", "reward"] * mask
        with torch.no_grad():
            advantage(imagined)
        torch.testing.assert_close(plan["returns"], imagined["advantage"][:, :, 0, 0])

    def test_statistics_for_plots(self) -> None:
        env = cliff().env
        planner = CEMPlanner(
            env, planning_horizon=8, optim_steps=5, num_candidates=64, top_k=8
        )
        plan = planner.plan(TensorDict({"latent": torch.zeros(2, 1)}, [2]))
        assert plan["candidates"].shape == (2, 64, 8, 1)
        assert plan["iterations", "mean_return"].shape == (2, 5)
        elite, best = (
            plan["iterations", "elite_return"],
            plan["iterations", "max_return"],
        )
        assert (best >= elite).all() and (
            elite >= plan["iterations", "mean_return"]
        ).all()
        assert (elite[:, -1] > elite[:, 0]).all()


class TestErrors:
    @pytest.mark.parametrize(
        "options, message",
        [
            ({"top_k": 13}, "top_k=13 of num_candidates=12"),
            ({"planning_horizon": 0}, "planning_horizon must be a positive int"),
            ({"optim_steps": -1}, "optim_steps must be a positive int"),
            ({"num_candidates": 2.5}, "num_candidates must be a positive int"),
            ({"num_particles": 0}, "num_particles must be a positive int"),
            ({"num_policy_candidates": 3}, "policy="),
            ({"discount": 1.5}, "discount"),
            ({"momentum": 1.0}, "momentum"),
            ({"init_std": 0.0}, "init_std"),
            ({"min_std": 2.0}, "min_std"),
            ({"act_on": "median"}, "'mean' or 'best'"),
            ({"action_key": "move"}, r"no action 'move'; it has \['action'\]"),
            ({"reward_key": ("next", "cost")}, "no reward"),
            ({"action_range": 3}, "pair"),
            ({"action_range": (1.0, -1.0)}, "lower ones not above"),
            ({"action_range": (torch.zeros(3), 1.0)}, r"\(2,\)"),
        ],
    )
    @every_planner
    def test_at_construction(self, planner_class, options, message) -> None:
        with pytest.raises(ValueError, match=message):
            planner_class(small_env(), **{**SMALL, **options})

    def test_unbounded_actions_without_a_range(self) -> None:
        with pytest.raises(ValueError, match=r"action_range=\(low, high\)"):
            CEMPlanner(env_for(Unbounded((2,))), **SMALL)

    def test_actions_of_a_kind_that_is_not_served(self) -> None:
        with pytest.raises(TypeError, match="MultiOneHot"):
            CEMPlanner(env_for(MultiOneHot((2, 3))), **SMALL)
        with pytest.raises(ValueError, match="choice of 4"):
            CEMPlanner(env_for(OneHot(4)), action_range=(0, 1), **SMALL)

    def test_several_actions(self) -> None:
        env = SpecEnv()
        env.action_spec = Composite(
            action=Bounded(-1.0, 1.0, (2,)), other=Bounded(-1.0, 1.0, (2,))
        )
        with pytest.raises(ValueError, match="other"):
            CEMPlanner(WorldModelEnv(make_model(), env), **SMALL)

    def test_batch_locked_env(self) -> None:
        env = WorldModelEnv(make_model(), SpecEnv(), batch_size=[4])
        with pytest.raises(ValueError, match=r"\(4,\).*batch_size=\[\]"):
            CEMPlanner(env, **SMALL)
        with pytest.raises(ValueError, match="WorldModelEnv"):
            CEMPlanner(GymEnv("Pendulum-v1"), **SMALL)

    def test_something_else(self) -> None:
        with pytest.raises(TypeError, match="WorldModelEnv"):
            CEMPlanner(make_model(), **SMALL)
        with pytest.raises(TypeError, match="advantage_module"):
            MPPIPlanner(small_env(), 3, 2, 12, 4)
        with pytest.raises(ValueError, match="temperature"):
            MPPIPlanner(small_env(), temperature=0.0)
        value = Mod(lambda x: (x, x), ["latent"], ["a", "b"])
        with pytest.raises(ValueError, match="state_value"):
            CEMPlanner(small_env(), terminal_value=value, **SMALL)

    @pytest.mark.parametrize(
        "option", [{"noise_beta": -1}, {"kept_elites": 2}, {"population_decay": 0.5}]
    )
    def test_of_icem(self, option) -> None:
        with pytest.raises(ValueError, match=next(iter(option))):
            ICEMPlanner(small_env(), **SMALL, **option)
