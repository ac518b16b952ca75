"""The imagined env: specs, latents that move, resets, endings, seeding, wiring errors."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from functools import partial

import pytest
import torch
from _models import (
    ACTION,
    clock_env,
    clock_model,
    ends_at,
    LATENT,
    linear,
    make_model,
    OBS,
    observations,
    SpecEnv,
    times,
    transitions,
)
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torchrl.data import (
    Bounded,
    Categorical,
    Composite,
    LazyTensorStorage,
    OneHot,
    ReplayBuffer,
    SamplerWithoutReplacement,
    SliceSampler,
    Unbounded,
)
from torchrl.envs import EnvBase, GymEnv, StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs, step_mdp
from torchrl.modules import CEMPlanner

from torchrl_wm import WorldModel, WorldModelEnv

SIZES = [(), (3,), (2, 3)]


def start_of(model: WorldModel, *size: int) -> TensorDict:
    return model.encode(observations(*size)).detach()


def real_rollout(steps: int) -> TensorDict:
    """Real transitions with the name of the time dim, as TorchRL's rollouts have it."""
    return transitions(steps).refine_names("time")


class TestSpecs:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("reference", SIZES)
    @pytest.mark.parametrize(
        "action",
        [
            Bounded(-2.0, 3.0, (ACTION,)),
            Unbounded((ACTION,)),
            OneHot(ACTION),
            Categorical(4),
            Bounded(-1.0, 1.0, (2, 3)),
        ],
        ids=["bounded", "unbounded", "one-hot", "categorical", "matrix"],
    )
    def test_rebatched_leaf_by_leaf(self, size, reference, action) -> None:
        base = SpecEnv(reference, action_spec=action)
        env = WorldModelEnv(
            WorldModel(
                linear(["observation"], ["latent"], [OBS, LATENT]),
                Mod(lambda x, a: x + 1, ["latent", "action"], [("next", "latent")]),
                linear([("next", "latent")], [("next", "reward")], [LATENT, 1]),
            ),
            base,
            batch_size=size,
        )
        assert env.batch_size == size
        assert env.action_spec == action.expand(*size, *action.shape).clone()
        assert env.action_spec.shape == (*size, *action.shape)
        assert env.reward_spec.shape == (*size, 1)
        assert env.full_done_spec["done"].shape == (*size, 1)
        assert env.observation_spec["latent"].shape == (*size, LATENT)
        assert env.state_spec["latent"].shape == (*size, LATENT)

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("decode", [False, True])
    @pytest.mark.parametrize("max_steps", [None, 2])
    def test_check_env_specs(self, size, decode, max_steps) -> None:
        env = WorldModelEnv(
            make_model(done="terminated_logits", decoder=True),
            SpecEnv(),
            batch_size=size,
            start_states=observations(10),
            decode=decode,
            max_steps=max_steps,
        )
        check_env_specs(env, break_when_any_done="both")
        check_env_specs(env, seed=1)

    def test_defaults_come_from_the_reference(self) -> None:
        assert WorldModelEnv(make_model(), SpecEnv([5])).batch_size == (5,)
        env = WorldModelEnv(make_model(), SpecEnv())
        assert env.batch_size == () and not env.batch_locked
        assert env.device == torch.device("cpu")

    def test_int_is_one_batch_dim(self) -> None:
        env = WorldModelEnv(make_model(), SpecEnv(), batch_size=3)
        assert env.batch_size == (3,) and env.batch_locked

    def test_lock_belongs_to_the_instance(self) -> None:
        open_env = WorldModelEnv(make_model(), SpecEnv())
        locked = WorldModelEnv(make_model(), SpecEnv(), batch_size=[2])
        assert (open_env.batch_locked, locked.batch_locked) == (False, True)

    def test_nested_keys(self) -> None:
        base = SpecEnv(
            observation_key=("obs", "vector"),
            action_key=("act", "torque"),
            reward_key=("signal", "reward"),
        )
        model = make_model(
            latent=("deep", "latent"),
            observation=("obs", "vector"),
            action=("act", "torque"),
            reward=("signal", "reward"),
        )
        starts = TensorDict({"obs": {"vector": torch.randn(7, OBS)}}, [7])
        env = WorldModelEnv(model, base, start_states=starts, batch_size=[4])
        check_env_specs(env)
        rollout = env.rollout(5)
        assert rollout["next", "deep", "latent"].shape == (4, 5, LATENT)
        assert rollout["next", "signal", "reward"].shape == (4, 5, 1)
        assert rollout["act", "torque"].shape == (4, 5, ACTION)
        moved = rollout["deep", "latent"][:, 1:]
        assert torch.equal(moved, rollout["next", "deep", "latent"][:, :-1])

    @pytest.mark.parametrize("size", [(), (3,)])
    def test_latent_shape_from_explicit_spec(self, size) -> None:
        base = SpecEnv(observation_key="unrelated")
        spec = Composite(latent=Unbounded((LATENT,)))
        for given in (spec, spec.expand(size).clone(), Unbounded((*size, LATENT))):
            env = WorldModelEnv(
                make_model(), base, batch_size=size, observation_spec=given
            )
            assert env.observation_spec["latent"].shape == (*size, LATENT)

    def test_latent_shape_from_the_reference_entry(self) -> None:
        base = SpecEnv(observation_key="x", extra_observations={"latent": (LATENT,)})
        env = WorldModelEnv(make_model(), base)
        assert env.observation_spec["latent"].shape == (LATENT,)

    def test_bounds_of_real_observations_do_not_bind_predictions(self) -> None:
        env = GymEnv("Pendulum-v1")
        model = WorldModel(
            Mod(nn.Identity(), ["observation"], ["observation"]),
            Mod(
                lambda x, a: x + 100,
                ["observation", "action"],
                [("next", "observation")],
            ),
            Mod(lambda x: x[..., :1] * 0, ["observation"], [("next", "reward")]),
        )
        check_env_specs(WorldModelEnv(model, env, start_states=env))

    def test_tracing_leaves_no_trace(self) -> None:
        model = make_model()
        model.encoder = Mod(
            nn.Sequential(nn.BatchNorm1d(OBS), nn.Dropout(), nn.Linear(OBS, LATENT)),
            ["observation"],
            ["latent"],
        )
        model.encoder.module[1].eval()
        modes = [m.training for m in model.modules()]
        state, noise = model.state_dict(), torch.get_rng_state()
        before = {k: v.clone() for k, v in state.items()}
        WorldModelEnv(model, SpecEnv())
        assert [m.training for m in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), noise)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    def test_lazy_models_do_not_become_twins(self) -> None:
        def lazy() -> WorldModel:
            model = make_model()
            model.reward_head = Mod(
                nn.LazyLinear(1), [("next", "latent")], [("next", "reward")]
            )
            WorldModelEnv(model, SpecEnv())
            return model

        first, second = (lazy().reward_head.module.weight for _ in range(2))
        assert not torch.equal(first, second)

    def test_device_moves_the_whole_model(self) -> None:
        model = make_model()
        WorldModelEnv(model, SpecEnv(), device="meta")
        assert {p.device.type for p in model.parameters()} == {"meta"}

    def test_device_defaults_to_the_models(self) -> None:
        env = WorldModelEnv(make_model().to("meta"), SpecEnv())
        assert env.device.type == "meta"
        assert env.action_spec.device.type == "meta"

    def test_a_moved_env_imagines_where_it_is(self) -> None:
        env = WorldModelEnv(make_model(), SpecEnv(), max_steps=3).to("meta")
        start = TensorDict({"latent": torch.zeros(2, LATENT)}, [2])
        assert {value.device.type for value in env.reset(start).values()} == {"meta"}

    def test_layouts_do_not_change(self) -> None:
        env = WorldModelEnv(make_model(), SpecEnv(done_names=("done", "terminated")))
        before = env.imaginer.layout
        assert "truncated" not in before.done.keys()
        with pytest.raises(dataclasses.FrozenInstanceError):
            before.done = before.reward
        env.add_truncated_keys()
        after = env.imaginer.layout
        assert "truncated" in after.done.keys() and after is not before

    def test_state_dict_is_the_models_and_not_the_sources(self) -> None:
        model = make_model()
        source = WorldModelEnv(make_model(), SpecEnv(), start_states=observations(3))
        env = WorldModelEnv(model, SpecEnv(), start_states=source)
        assert len(env.state_dict()) == len(model.state_dict())
        other = make_model()
        prefix = "world_model."
        other.load_state_dict(
            {k[len(prefix) :]: v for k, v in env.state_dict().items()}
        )
        assert torch.equal(
            other.encoder.module[0].weight, model.encoder.module[0].weight
        )


class TestImagination:
    @pytest.mark.parametrize("size", [(3,), (2, 3)])
    @pytest.mark.parametrize("locked", [False, True])
    def test_rollout_equals_a_hand_loop(self, size, locked) -> None:
        model = make_model()
        env = WorldModelEnv(model, SpecEnv(), batch_size=size if locked else [])
        policy = linear(["latent"], ["action"], [LATENT, ACTION])
        start = start_of(model, *size)
        rollout = env.rollout(6, policy, tensordict=start.clone())
        latent = start["latent"]
        for t in range(6):
            action = policy.module(latent)
            step = (..., t, slice(None))
            assert torch.equal(rollout["latent"][step], latent)
            assert torch.equal(rollout["action"][step], action)
            latent = model.dynamics.module(latent, action)
            assert torch.equal(rollout["next", "latent"][step], latent)
            reward = model.reward_head.module(latent)
            assert torch.equal(rollout["next", "reward"][step], reward)

    def test_one_env_takes_any_batch(self) -> None:
        model = make_model()
        env = WorldModelEnv(model, SpecEnv())
        for size in [(), (5,), (2, 3, 4)]:
            out = env.rollout(3, tensordict=start_of(model, *size))
            assert out.batch_size == (*size, 3)

    def test_gradients_flow_through_the_rollout(self) -> None:
        model = make_model()
        env = WorldModelEnv(model, SpecEnv())
        policy = linear(["latent"], ["action"], [LATENT, ACTION])
        env.rollout(4, policy, tensordict=start_of(model, 3))[
            "next", "reward"
        ].sum().backward()
        for module in (policy, model.dynamics, model.reward_head):
            assert all(p.grad is not None for p in module.parameters())

    def test_start_tensordict_is_not_written_to(self) -> None:
        model = make_model()
        start = start_of(model, 3)
        keys = set(start.keys(True, True))
        WorldModelEnv(model, SpecEnv()).rollout(2, tensordict=start)
        assert set(start.keys(True, True)) == keys

    def test_replaced_component_is_noticed(self) -> None:
        model = make_model()
        env = WorldModelEnv(model, SpecEnv())
        start = start_of(model, 3)
        env.rollout(2, tensordict=start)
        model.reward_head = Mod(
            lambda x: torch.full_like(x[..., :1], 7.0),
            [("next", "latent")],
            [("next", "reward")],
        )
        assert (env.rollout(2, tensordict=start)["next", "reward"] == 7).all()

    def test_replaced_component_that_does_not_fit_is_refused(self) -> None:
        model = make_model()
        env = WorldModelEnv(model, SpecEnv())
        model.reward_head = linear(
            [("next", "latent")], [("next", "bonus")], [LATENT, 1]
        )
        with pytest.raises(ValueError, match="reward_head writes.*bonus"):
            env.rollout(2, tensordict=start_of(model, 3))

    def test_context_is_carried(self) -> None:
        model = make_model()
        model.dynamics = Mod(
            lambda x, goal, a: x + goal,
            ["latent", "goal", "action"],
            [("next", "latent")],
        )
        base = SpecEnv(extra_observations={"goal": (LATENT,)})
        env = WorldModelEnv(model, base)
        start = start_of(model, 3).set("goal", torch.randn(3, LATENT))
        out = env.rollout(4, tensordict=start)
        assert torch.equal(out["goal"], start["goal"].unsqueeze(1).expand(3, 4, LATENT))
        assert torch.equal(out["next", "goal"], out["goal"])
        moved = out["next", "latent"] - out["latent"]
        assert torch.allclose(moved, out["goal"], atol=1e-5)

    def test_rollout_signature_is_inherited(self) -> None:
        ours, theirs = WorldModelEnv.rollout, EnvBase.rollout
        assert inspect.signature(ours) == inspect.signature(theirs)


class TestDecoding:
    def make(self, **kwargs) -> tuple[WorldModel, WorldModelEnv]:
        model = make_model(decoder=True)
        return model, WorldModelEnv(model, SpecEnv(), **kwargs)

    def test_nothing_is_decoded_unless_asked_for(self) -> None:
        model, env = self.make()
        model.decoder.module.forward = None  # calling it would raise
        assert "observation" not in env.rollout(3, tensordict=start_of(model, 2)).keys()

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"decode": True},
            {"observation_spec": Composite(observation=Unbounded((OBS,)))},
        ],
        ids=["decode", "spec"],
    )
    def test_next_observation_is_of_the_next_latent(self, kwargs) -> None:
        model, env = self.make(**kwargs)
        start = start_of(model, 2)
        out = env.rollout(3, tensordict=start)
        decoded = model.decoder.module(out["next", "latent"])
        assert torch.allclose(out["next", "observation"], decoded, atol=1e-6)
        own = start["observation"]
        assert torch.equal(out["observation"][:, 0], own)
        assert torch.equal(
            out["observation"][:, 1:], out["next", "observation"][:, :-1]
        )

    def test_root_observation_is_decoded_where_none_is_given(self) -> None:
        model, env = self.make(decode=True)
        start = start_of(model, 2).select("latent")
        out = env.rollout(3, tensordict=start)
        expected = model.decoder.module(start["latent"])
        assert torch.equal(out["observation"][:, 0], expected)

    def test_decoder_may_read_and_write_below_next(self) -> None:
        model = make_model()
        model.decoder = linear(
            [("next", "latent")], [("next", "observation")], [LATENT, OBS]
        )
        env = WorldModelEnv(model, SpecEnv(), decode=True)
        out = env.rollout(3, tensordict=start_of(model, 2))
        decoded = model.decoder.module(out["next", "latent"])
        assert torch.allclose(out["next", "observation"], decoded, atol=1e-6)


class TestReset:
    def test_latents_are_used(self) -> None:
        model = make_model()
        start = start_of(model, 3)
        start["observation"] = torch.full((3, OBS), float("nan"))  # not encoded
        out = WorldModelEnv(model, SpecEnv()).reset(start)
        assert torch.equal(out["latent"], start["latent"])

    def test_observations_are_encoded(self) -> None:
        model = make_model()
        start = observations(3)
        out = WorldModelEnv(model, SpecEnv()).reset(start)
        assert torch.equal(out["latent"], model.encoder.module(start["observation"]))

    def test_without_a_start(self) -> None:
        env = WorldModelEnv(make_model(), SpecEnv())
        for call in (env.reset, partial(env.rollout, 3)):
            with pytest.raises(RuntimeError, match="initial latent") as err:
                call()
            assert "tensordict=world_model.encode(obs)" in str(err.value)
            assert "start_states=" in str(err.value)

    def test_what_a_replay_sample_carries_is_dropped(self) -> None:
        model = make_model()
        env = WorldModelEnv(model, SpecEnv())
        sample = transitions(3)
        sample.update({"reward": torch.ones(3, 1), "goal": torch.ones(3, 2)})
        sample.set("done", torch.ones(3, 1, dtype=torch.bool))
        out = env.reset(sample)
        assert set(out.keys()) == {"latent", "goal", "done", "terminated", "truncated"}
        assert not out["done"].any()
        assert "observation" in sample.keys(), "the caller's tensordict lost an entry"
        rollout = env.rollout(4, tensordict=sample)
        assert "observation" not in rollout.keys()

    def test_nested_entries_of_the_caller_are_not_written_to(self) -> None:
        model = make_model(latent=("deep", "latent"))
        start = observations(3).set(("deep", "extra"), torch.ones(3, 1))
        WorldModelEnv(model, SpecEnv()).reset(start)
        assert set(start["deep"].keys()) == {"extra"}

    @pytest.mark.parametrize("size", [(), (4,), (2, 3)])
    @pytest.mark.parametrize("locked", [False, True])
    def test_start_states(self, size, locked) -> None:
        buffer = ReplayBuffer(storage=LazyTensorStorage(20), batch_size=2)
        buffer.extend(observations(20))
        trajectories = ReplayBuffer(storage=LazyTensorStorage(20))
        trajectories.extend(transitions(20, 5))
        model = make_model()
        inner = WorldModelEnv(
            make_model(decoder=True),
            SpecEnv(),
            batch_size=[3],
            decode=True,
            start_states=observations(9),
        )
        sources = [
            observations(7),
            observations(2, 5),
            buffer,
            trajectories,
            inner,
            lambda n: observations(*n),
            start_of(model, 5),
        ]
        for source in sources:
            env = WorldModelEnv(
                model, SpecEnv(), start_states=source, batch_size=size if locked else []
            )
            start = None if locked else TensorDict({}, batch_size=size)
            assert env.reset(start)["latent"].shape == (*size, LATENT)
            assert env.reset().batch_size == (size if locked else ())

    def test_rows_of_a_tensordict_are_drawn_with_their_entries(self) -> None:
        env = WorldModelEnv(
            clock_model(),
            clock_env(),
            start_states=times(*map(float, range(50))),
            batch_size=[200],
        )
        drawn = env.reset()["latent"].flatten().tolist()
        assert set(drawn) <= set(range(50)) and len(set(drawn)) > 20

    def test_goal_of_the_caller_counts_for_sampled_states(self) -> None:
        model = make_model()
        model.dynamics = Mod(
            lambda x, goal, a: x + goal,
            ["latent", "goal", "action"],
            [("next", "latent")],
        )
        base = SpecEnv(extra_observations={"goal": (LATENT,)})
        env = WorldModelEnv(model, base, start_states=observations(5))
        goal = torch.randn(3, LATENT)
        out = env.reset(TensorDict({"goal": goal}, [3]))
        assert torch.equal(out["goal"], goal)

    def test_partial_reset_touches_only_the_masked_rows(self) -> None:
        env = WorldModelEnv(
            clock_model(done=ends_at(5)),
            clock_env(),
            start_states=times(100.0),
            batch_size=[3],
        )
        td = step_mdp(env.rand_step(env.reset(times(4.0, 1.0, 4.0))))
        assert td["done"].flatten().tolist() == [True, False, True]
        td["extra"] = torch.arange(3.0).unsqueeze(-1)
        td["_reset"] = torch.tensor([[True], [False], [False]])
        out = env.reset(td)
        assert out["latent"].flatten().tolist() == [100.0, 2.0, 5.0]
        assert out["done"].flatten().tolist() == [False, False, True]
        assert out["extra"].flatten().tolist() == [0.0, 1.0, 2.0]
        assert td["latent"].flatten().tolist() == [5.0, 2.0, 5.0]

    def test_partial_reset_without_a_source_uses_the_given_latents(self) -> None:
        env = WorldModelEnv(clock_model(done=ends_at(5)), clock_env(), batch_size=[2])
        td = step_mdp(env.rand_step(env.reset(times(4.0, 4.0))))
        td["latent"][0] = 0.0
        td["_reset"] = torch.tensor([[True], [False]])
        out = env.reset(td)
        assert out["latent"].flatten().tolist() == [0.0, 5.0]
        assert out["done"].flatten().tolist() == [False, True]

    def test_set_state_false_ignores_the_given_state(self) -> None:
        env = WorldModelEnv(clock_model(), clock_env(), start_states=times(100.0))
        start = clock_model().encode(times(1.0, 2.0))
        assert env.reset(start)["latent"].flatten().tolist() == [1.0, 2.0]
        fresh = env.reset(start, set_state=False)
        assert fresh["latent"].flatten().tolist() == [100.0, 100.0]

    def test_no_warning_about_the_start_state(self, recwarn) -> None:
        model = make_model()
        WorldModelEnv(model, SpecEnv()).rollout(2, tensordict=start_of(model, 3))
        assert not [w for w in recwarn if issubclass(w.category, FutureWarning)]


class TestEndings:
    @pytest.mark.parametrize("key", ["terminated", "done"])
    def test_bool_head(self, key) -> None:
        env = WorldModelEnv(clock_model(done=ends_at(3, key)), clock_env())
        out = env.rollout(10, tensordict=times(0.0))
        assert out.batch_size == (1, 3)
        for name in ("done", "terminated"):
            assert out["next", name].flatten().tolist() == [False, False, True]
        assert not out["next", "truncated"].any()

    @pytest.mark.parametrize(
        "key,sign", [("terminated_logits", 1), ("continue_pred", -1)]
    )
    def test_logits(self, key, sign) -> None:
        head = Mod(lambda x: sign * (x - 2.5), [("next", "latent")], [("next", key)])
        env = WorldModelEnv(clock_model(done=head), clock_env())
        out = env.rollout(10, tensordict=times(0.0))
        assert out["next", "terminated"].flatten().tolist() == [False, False, True]
        assert out["next", "done"].flatten().tolist() == [False, False, True]
        assert out["next", "terminated"].dtype == torch.bool

    def test_done_and_truncated_head(self) -> None:
        head = Mod(
            lambda x: (x >= 2, x == 2),
            [("next", "latent")],
            [("next", "done"), ("next", "truncated")],
        )
        env = WorldModelEnv(clock_model(done=head), clock_env())
        out = env.imagine(3, tensordict=times(0.0))
        assert out["next", "done"].flatten().tolist() == [False, True, True]
        assert out["next", "truncated"].flatten().tolist() == [False, True, False]
        assert out["next", "terminated"].flatten().tolist() == [False, False, True]

    def test_done_beyond_terminated_is_a_truncation(self) -> None:
        head = Mod(
            lambda x: (x >= 1, x >= 2),
            [("next", "latent")],
            [("next", "done"), ("next", "terminated")],
        )
        base = clock_env(done_names=("done", "terminated"))
        out = WorldModelEnv(clock_model(done=head), base).imagine(
            2, tensordict=times(0.0)
        )
        assert out["next", "done"].flatten().tolist() == [True, True]
        assert out["next", "terminated"].flatten().tolist() == [False, True]
        assert out["next", "truncated"].flatten().tolist() == [True, False]

    @pytest.mark.parametrize("names", [("done",), ("done", "terminated", "truncated")])
    def test_time_limit_truncates(self, names) -> None:
        env = WorldModelEnv(clock_model(), clock_env(done_names=names), max_steps=4)
        out = env.rollout(10, tensordict=times(0.0, 5.0))
        assert out.batch_size == (2, 4)
        assert out["next", "truncated"][0].flatten().tolist() == [False] * 3 + [True]
        assert not out["next", "terminated"].any()
        assert torch.equal(out["next", "done"], out["next", "truncated"])
        assert "step_count" not in out.keys()

    def test_done_is_always_terminated_or_truncated(self) -> None:
        env = WorldModelEnv(clock_model(done=ends_at(3)), clock_env(), max_steps=2)
        out = env.imagine(5, tensordict=times(0.0, 2.0, 9.0))
        nxt = out["next"]
        assert torch.equal(nxt["done"], nxt["terminated"] | nxt["truncated"])
        for a, b in [("done", "terminated"), ("done", "truncated")]:
            assert nxt[a].data_ptr() != nxt[b].data_ptr()

    def test_time_starts_anew_after_a_partial_reset(self) -> None:
        env = WorldModelEnv(
            clock_model(done=ends_at(3)),
            clock_env(),
            start_states=times(0.0),
            max_steps=10,
            batch_size=[2],
        )
        out = env.rollout(8, tensordict=times(0.0, 1.0), break_when_any_done=False)
        expected = [[0, 1, 2, 0, 1, 2, 0, 1], [1, 2, 0, 1, 2, 0, 1, 2]]
        assert out["latent"].squeeze(-1).tolist() == expected

    def test_without_a_source_finished_rows_are_left_as_they_are(self) -> None:
        env = WorldModelEnv(clock_model(done=ends_at(2)), clock_env())
        out = env.rollout(4, tensordict=times(0.0, -9.0), break_when_any_done=False)
        assert out["next", "latent"][0].flatten().tolist() == [1.0, 2.0, 3.0, 4.0]

    @pytest.mark.parametrize("locked", [False, True])
    def test_break_when_all_done(self, locked) -> None:
        env = WorldModelEnv(
            clock_model(done=ends_at(3)), clock_env(), batch_size=[3] if locked else []
        )
        out = env.rollout(10, tensordict=times(0.0, 1.0, 2.0), break_when_all_done=True)
        assert out.batch_size == (3, 3)
        assert out["next", "latent"].squeeze(-1).tolist() == [
            [1.0, 2.0, 3.0],
            [2.0, 3.0, 3.0],
            [3.0, 3.0, 3.0],
        ]

    def test_partial_step_of_a_locked_env(self) -> None:
        env = WorldModelEnv(clock_model(), clock_env(), batch_size=[2])
        td = env.rand_action(env.reset(times(0.0, 5.0)))
        td["_step"] = torch.tensor([True, False])
        out = env.step(td)
        assert out["next", "latent"].flatten().tolist() == [1.0, 5.0]
        assert out["next", "reward"].flatten().tolist() == [1.0, 0.0]


class TestSeeding:
    def noisy(self) -> WorldModel:
        model = make_model()
        model.dynamics = Mod(
            lambda x, a: x + torch.randn_like(x),
            ["latent", "action"],
            [("next", "latent")],
        )
        return model

    @pytest.mark.parametrize("size", [(), (3,)])
    def test_rollouts_repeat(self, size) -> None:
        env = WorldModelEnv(
            self.noisy(), SpecEnv(), batch_size=size, start_states=observations(50)
        )
        runs = []
        for _ in range(2):
            env.set_seed(3)
            runs.append(env.rollout(4))
        assert (runs[0] == runs[1]).all()
        env.set_seed(4)
        assert not (runs[0] == env.rollout(4)).all()

    def test_env_that_starts_come_from_is_seeded(self) -> None:
        real = GymEnv("Pendulum-v1")
        model = make_model(action_dim=1)
        model.encoder = linear(["observation"], ["latent"], [3, LATENT])
        env = WorldModelEnv(model, real, start_states=real, batch_size=[3])
        runs = []
        for _ in range(2):
            env.set_seed(3)
            runs.append(env.rollout(4))
        assert (runs[0] == runs[1]).all()

    def test_no_warning(self, recwarn) -> None:
        WorldModelEnv(make_model(), SpecEnv()).set_seed(0)
        # What is collected meanwhile may be another test's file that was not closed.
        assert not [w for w in recwarn if w.category is not ResourceWarning]


class TestImagine:
    def test_full_horizon_and_mask(self) -> None:
        env = WorldModelEnv(clock_model(done=ends_at(3)), clock_env())
        out = env.imagine(4, tensordict=times(0.0, 2.0, -5.0))
        assert out.batch_size == (3, 4) and out.names[-1] == "time"
        assert out["collector", "mask"].tolist() == [
            [True, True, True, False],
            [True, False, False, False],
            [True, True, True, True],
        ]
        assert out["next", "latent"][1].flatten().tolist() == [3.0, 4.0, 5.0, 6.0]

    @pytest.mark.parametrize("size", [(), (3,), (2, 3)])
    @pytest.mark.parametrize("locked", [False, True])
    def test_equals_rollout_with_the_same_actions(self, size, locked) -> None:
        model = make_model()
        env = WorldModelEnv(model, SpecEnv(), batch_size=size if locked else [])
        start = start_of(model, *size)
        rollout = env.rollout(5, tensordict=start)
        out = env.imagine(5, tensordict=start, actions=rollout["action"])
        mask = out["collector", "mask"]
        assert mask.shape == (*size, 5) and mask.all()
        assert (out.exclude("collector") == rollout).all()
        assert set(out.keys(True)) - {"collector", ("collector", "mask")} == set(
            rollout.keys(True)
        )

    def test_policy_and_gradients(self) -> None:
        model = make_model()
        env = WorldModelEnv(model, SpecEnv())
        policy = linear(["latent"], ["action"], [LATENT, ACTION])
        start = start_of(model, 3)
        out = env.imagine(5, policy, start)
        assert (
            out.exclude("collector") == env.rollout(5, policy, tensordict=start)
        ).all()
        out["next", "reward"].sum().backward()
        assert all(p.grad is not None for p in policy.parameters())

    def test_starts_are_drawn_for_the_actions(self) -> None:
        env = WorldModelEnv(make_model(), SpecEnv(), start_states=observations(5))
        assert env.imagine(3, actions=torch.zeros(7, 3, ACTION)).batch_size == (7, 3)
        assert env.imagine(3).batch_size == (3,)

    def test_never_restarts(self) -> None:
        env = WorldModelEnv(
            clock_model(done=ends_at(1)), clock_env(), start_states=times(0.0)
        )
        out = env.imagine(3, tensordict=times(0.0))
        assert out["next", "latent"].flatten().tolist() == [1.0, 2.0, 3.0]

    def test_nested_actions(self) -> None:
        model = make_model(action=("act", "torque"))
        env = WorldModelEnv(model, SpecEnv(action_key=("act", "torque")))
        actions = torch.randn(2, 3, ACTION)
        start = start_of(model, 2)
        one = env.imagine(3, tensordict=start, actions=actions)
        as_td = TensorDict({("act", "torque"): actions}, [2, 3])
        two = env.imagine(3, tensordict=start, actions=as_td)
        assert torch.equal(one["act", "torque"], actions)
        assert (one == two).all()

    def test_bad_arguments(self) -> None:
        model = make_model()
        env = WorldModelEnv(model, SpecEnv())
        start = start_of(model, 2)
        policy = linear(["latent"], ["action"], [LATENT, ACTION])
        with pytest.raises(ValueError, match="horizon must be at least 1, got 0"):
            env.imagine(0, tensordict=start)
        with pytest.raises(ValueError, match="not both"):
            env.imagine(2, policy, start, torch.zeros(2, 2, ACTION))
        with pytest.raises(ValueError, match=r"\(2, 5, 2\), got shape \(2, 3, 2\)"):
            env.imagine(5, tensordict=start, actions=torch.zeros(2, 3, ACTION))


class TestBadInput:
    def test_arguments(self) -> None:
        model, base = make_model(), SpecEnv()
        with pytest.raises(TypeError, match="base_env must be.*EnvBase.*GymWrapper"):
            WorldModelEnv(model, nn.Identity())
        with pytest.raises(
            TypeError, match="world_model must be a torchrl_wm.WorldModel"
        ):
            WorldModelEnv(nn.Identity(), base)
        for steps in (0, -1, 2.5):
            with pytest.raises(ValueError, match="max_steps"):
                WorldModelEnv(model, base, max_steps=steps)
        with pytest.raises(TypeError, match="start_states must be"):
            WorldModelEnv(model, base, start_states=3)
        with pytest.raises(ValueError, match="latent_key='z'.*'latent'"):
            WorldModelEnv(model, base, latent_key="z")
        with pytest.raises(ValueError, match="decode=True needs.*decoder="):
            WorldModelEnv(model, base, decode=True)

    def test_nothing_is_half_changed(self) -> None:
        model = make_model()
        with pytest.raises(TypeError):
            WorldModelEnv(model, nn.Identity(), device="meta")
        assert {p.device.type for p in model.parameters()} == {"cpu"}

    def test_root_key_that_nothing_supplies(self) -> None:
        model = make_model(action="act")
        with pytest.raises(ValueError) as err:
            WorldModelEnv(model, SpecEnv())
        message = str(err.value)
        assert "dynamics reads 'act'" in message and "['action']" in message

    def test_no_latent(self) -> None:
        model = make_model()
        model.dynamics = linear(
            ["latent", "action"], [("next", "other")], [LATENT + ACTION, LATENT]
        )
        model.reward_head = linear(
            [("next", "other")], [("next", "reward")], [LATENT, 1]
        )
        with pytest.raises(ValueError, match="no latent that moves"):
            WorldModelEnv(model, SpecEnv())

    def test_reward_under_another_key(self) -> None:
        model = make_model(reward="return")
        with pytest.raises(
            ValueError, match=r"\['reward'\].*reward_head writes.*return"
        ):
            WorldModelEnv(model, SpecEnv())

    @pytest.mark.parametrize("key", ["done", "terminated", "truncated"])
    def test_float_under_a_bool_done_key(self, key) -> None:
        model = make_model(done=key)  # legal in the model
        with pytest.raises(ValueError) as err:
            WorldModelEnv(model, SpecEnv())
        message = str(err.value)
        assert f"done_head writes ('next', '{key}') as torch.float32" in message
        assert "('next', 'terminated_logits')" in message
        assert "ends in a sigmoid: take that off" in message

    def test_int_under_a_bool_done_key(self) -> None:
        head = Mod(
            lambda x: (x > 0).int()[..., :1], [("next", "latent")], [("next", "done")]
        )
        with pytest.raises(
            ValueError, match="done_head writes.*torch.int32.*torch.bool"
        ):
            WorldModelEnv(make_model(done=head), SpecEnv())

    def test_reward_of_another_shape_or_dtype(self) -> None:
        model = make_model()
        for function, text in [
            (lambda x: x[..., 0], r"feature shape \(\).*\(1,\)"),
            (lambda x: x[..., :1].double(), "torch.float64.*torch.float32"),
        ]:
            model.reward_head = Mod(
                function, [("next", "latent")], [("next", "reward")]
            )
            with pytest.raises(ValueError, match=f"reward_head writes.*reward.*{text}"):
                WorldModelEnv(model, SpecEnv())

    def test_latent_that_disagrees_with_its_spec(self) -> None:
        spec = Composite(latent=Unbounded((LATENT + 1,)))
        with pytest.raises(ValueError, match="encoder writes 'latent'.*spec says"):
            WorldModelEnv(make_model(), SpecEnv(), observation_spec=spec)
        spec = Composite(latent=Unbounded((LATENT,), dtype=torch.float64))
        with pytest.raises(ValueError, match="latent.*torch.float32.*torch.float64"):
            WorldModelEnv(make_model(), SpecEnv(), observation_spec=spec)
        model = make_model()
        model.dynamics = Mod(
            lambda x, a: torch.cat([x, a], -1),
            ["latent", "action"],
            [("next", "latent")],
        )
        with pytest.raises(
            (ValueError, RuntimeError),
            match="dynamics writes.*latent|reward_head failed",
        ):
            WorldModelEnv(model, SpecEnv())

    def test_spec_that_nothing_produces(self) -> None:
        base = SpecEnv()
        with pytest.raises(ValueError, match="observation.*cannot produce"):
            WorldModelEnv(make_model(), base, observation_spec=base.observation_spec)

    def test_spec_of_another_batch_size(self) -> None:
        spec = Composite(latent=Unbounded((5, LATENT)), shape=(5,))
        with pytest.raises(ValueError, match=r"batch shape \(5,\).*\(3,\)"):
            WorldModelEnv(make_model(), SpecEnv(), batch_size=3, observation_spec=spec)

    def test_latent_shape_that_cannot_be_inferred(self) -> None:
        with pytest.raises(ValueError, match="latent 'latent' cannot be inferred"):
            WorldModelEnv(make_model(), SpecEnv(observation_key="pixels"))

    def test_component_that_fails_is_named(self) -> None:
        model = make_model()
        model.dynamics = Mod(
            nn.Linear(LATENT + ACTION, LATENT),
            ["latent", "action"],
            [("next", "latent")],
        )
        with pytest.raises(
            RuntimeError, match="dynamics failed.*TypeError.*3 were given"
        ):
            WorldModelEnv(model, SpecEnv())

    def test_start_of_the_wrong_batch_size(self) -> None:
        model = make_model()
        env = WorldModelEnv(model, SpecEnv(), batch_size=3)
        for call in (env.reset, partial(env.imagine, 2, None)):
            with pytest.raises(
                RuntimeError, match=r"\(3,\).*got \(5,\).*batch_size=\[\]"
            ):
                call(start_of(model, 5))

    def test_start_without_its_batch_size(self) -> None:
        env = WorldModelEnv(make_model(), SpecEnv())
        start = TensorDict({"latent": torch.zeros(5, LATENT)}, batch_size=[])
        with pytest.raises(
            ValueError, match=r"'latent' has shape \(5, 4\).*batch_size"
        ):
            env.reset(start)

    def test_start_of_the_wrong_dtype(self) -> None:
        env = WorldModelEnv(make_model(), SpecEnv())
        start = TensorDict({"latent": torch.zeros(5, LATENT).double()}, batch_size=[5])
        with pytest.raises(ValueError, match="'latent'.*float64.*float32"):
            env.reset(start)

    def test_missing_action(self) -> None:
        model = make_model()
        env = WorldModelEnv(model, SpecEnv())
        with pytest.raises(KeyError, match=r"No action.*'action'.*env.rand_action"):
            env.step(env.reset(start_of(model, 2)))

    @pytest.mark.parametrize("call", ["rollout", "imagine"])
    def test_policy_that_reads_what_is_not_there(self, call) -> None:
        model = make_model(decoder=True)
        env = WorldModelEnv(model, SpecEnv())
        policy = linear(["observation"], ["action"], [OBS, ACTION])
        with pytest.raises(
            KeyError, match=r"policy reads \['observation'\].*decode=True"
        ):
            getattr(env, call)(3, policy, tensordict=start_of(model, 2))

    def test_empty_sources(self) -> None:
        buffer = ReplayBuffer(storage=LazyTensorStorage(5))
        for source in (buffer, observations(0)):
            env = WorldModelEnv(make_model(), SpecEnv(), start_states=source)
            with pytest.raises(RuntimeError, match="no state to start from"):
                env.reset()

    def test_sources_that_give_something_else(self) -> None:
        wrong = [
            (lambda n: observations(2), r"\(3,\).*got batch size \(2,\)"),
            (lambda n: torch.zeros(3), "got Tensor"),
            (TensorDict({"x": torch.zeros(4, 1)}, [4]), "has no initial latent"),
        ]
        for source, text in wrong:
            env = WorldModelEnv(
                make_model(), SpecEnv(), batch_size=3, start_states=source
            )
            with pytest.raises(RuntimeError, match=text):
                env.reset()

    def test_done_head_that_nobody_listens_to(self) -> None:
        for key in [("next", "terminated_logit"), ("next", "fin"), "terminated_logits"]:
            model = make_model(done=linear([("next", "latent")], [key], [LATENT, 1]))
            with pytest.raises(
                ValueError, match="done_head writes.*none of which ends"
            ):
                WorldModelEnv(model, SpecEnv())

    def test_observation_that_would_stand_still(self) -> None:
        model = make_model(decoder=True)
        model.reward_head = linear(
            ["observation", "action"], [("next", "reward")], [OBS + ACTION, 1]
        )
        for decode in (False, True):
            with pytest.raises(ValueError, match="reward_head reads.*stand still"):
                WorldModelEnv(model, SpecEnv(), decode=decode)

    def test_goal_that_encoder_and_step_read_is_declared(self) -> None:
        model = make_model()
        model.encoder = linear(["observation", "goal"], ["latent"], [OBS + 2, LATENT])
        model.reward_head = linear(
            [("next", "latent"), "goal"], [("next", "reward")], [LATENT + 2, 1]
        )
        base = SpecEnv(extra_observations={"goal": (2,)})
        with pytest.raises(ValueError, match="constant over an episode.*Composite"):
            WorldModelEnv(model, base)
        env = WorldModelEnv(
            model, base, observation_spec=Composite(goal=Unbounded((2,)))
        )
        start = observations(3).set("goal", torch.randn(3, 2))
        assert (env.rollout(2, tensordict=start)["goal"][:, 1] == start["goal"]).all()

    @pytest.mark.parametrize("fault", ["reward", "done", "latent_key", "start_states"])
    def test_failed_construction_leaves_the_model_where_it_is(self, fault) -> None:
        kwargs = {
            "latent_key": {"latent_key": "z"},
            "start_states": {"start_states": 3},
        }
        model = make_model(
            reward="other" if fault == "reward" else "reward",
            done="done" if fault == "done" else None,
        )
        with pytest.raises((ValueError, TypeError)):
            WorldModelEnv(model, SpecEnv(), device="meta", **kwargs.get(fault, {}))
        assert {p.device.type for p in model.parameters()} == {"cpu"}

    def test_observations_that_are_not_the_reference_envs(self) -> None:
        env = WorldModelEnv(make_model(), SpecEnv())
        with pytest.raises(ValueError, match=r"'observation'.*\(3, 7\).*\(3, 6\)"):
            env.reset(observations(3, dim=OBS + 1))
        with pytest.raises(ValueError, match="'observation'.*float64.*float32"):
            env.reset(observations(3).apply(lambda x: x.double()))

    def test_actions_that_do_not_fit(self) -> None:
        model = make_model()
        env = WorldModelEnv(model, SpecEnv())
        td = env.reset(start_of(model, 3))
        with pytest.raises(ValueError, match=r"action 'action'.*\(3,\).*\(2,\)"):
            env.step(td.clone().set("action", torch.zeros(3, 3)))
        with pytest.raises(ValueError, match="torch.float64, its spec torch.float32"):
            env.step(td.clone().set("action", torch.zeros(3, ACTION).double()))

    def test_calls_in_the_wrong_order(self) -> None:
        model = make_model()
        env = WorldModelEnv(model, SpecEnv())
        start = start_of(model, 3)
        with pytest.raises(TypeError, match=r"imagine\(horizon, tensordict=start\)"):
            env.imagine(3, start)
        with pytest.raises(TypeError, match="horizon must be an int, got TensorDict"):
            env.imagine(start, 3)
        with pytest.raises(TypeError, match="start must be a TensorDict, got Tensor"):
            env.rollout(3, tensordict=start["latent"])
        with pytest.raises(TypeError, match="actions must be a tensor.*list"):
            env.imagine(2, actions=[[0.0]])
        locked = WorldModelEnv(
            model, SpecEnv(), batch_size=4, start_states=observations(3)
        )
        with pytest.raises(ValueError, match=r"\[\*B, H, \*A\] = \(4, 5, 2\)"):
            locked.imagine(5, actions=torch.zeros(4, 2))

    @pytest.mark.parametrize("size", [-1, 0, "4", [2, -3], 2.0])
    def test_batch_size(self, size) -> None:
        with pytest.raises((ValueError, TypeError)):
            WorldModelEnv(make_model(), SpecEnv(), batch_size=size)

    def test_check_finite(self) -> None:
        model = make_model()
        env = WorldModelEnv(model, SpecEnv(), check_finite=True)
        start = start_of(model, 3)
        env.rollout(3, tensordict=start)
        with torch.no_grad():
            model.reward_head.module[-1].bias.fill_(float("nan"))
        with pytest.raises(FloatingPointError, match=r"\('next', 'reward'\).*finite"):
            env.rollout(3, tensordict=start)
        start["latent"][1] = float("inf")
        with pytest.raises(FloatingPointError, match=r"inputs \['latent'\]"):
            env.rollout(3, tensordict=start)

    def test_replaced_decoder_with_other_keys(self) -> None:
        model = make_model(decoder=True)
        env = WorldModelEnv(model, SpecEnv(), decode=True)
        model.decoder = Mod(
            lambda z: (z.repeat_interleave(2, -1)[..., :OBS], z),
            ["latent"],
            ["observation", "extra"],
        )
        with pytest.raises(ValueError, match=r"\['extra'\].*new WorldModelEnv"):
            env.rollout(2, tensordict=start_of(model, 3))


class TestRealData:
    """What real rollouts, collectors and buffers hand over as start."""

    @pytest.mark.parametrize("call", ["rollout", "imagine"])
    def test_a_time_slice_is_a_start(self, call) -> None:
        data = real_rollout(10)
        assert data.names == ["time"]
        env = WorldModelEnv(make_model(), SpecEnv())
        out = getattr(env, call)(5, tensordict=data)
        assert out.batch_size == (10, 5) and out.names == [None, "time"]
        again = getattr(env, call)(2, tensordict=out[:, 0])
        assert again.batch_size == (10, 2)

    def test_a_planner_takes_a_time_slice(self) -> None:
        model = make_model()
        plan = CEMPlanner(WorldModelEnv(model, SpecEnv()), 3, 2, 10, 3)
        with torch.no_grad():
            assert plan(model.encode(real_rollout(4)))["action"].shape == (4, ACTION)

    def test_notes_of_real_samples_are_dropped(self) -> None:
        notes = {
            name: torch.ones(3, 1)
            for name in ("index", "weight", "priority_weight", "is_init", "step_count")
        }
        start = start_of(make_model(), 3).update(notes)
        start["collector", "mask"] = torch.ones(3, dtype=torch.bool)
        out = WorldModelEnv(make_model(), SpecEnv()).imagine(2, tensordict=start)
        assert not set(notes) & set(out.keys())
        assert out["collector", "mask"].shape == (3, 2)

    def test_images_that_are_decoded_as_floats(self) -> None:
        base = SpecEnv()
        base.observation_spec = Composite(
            observation=Bounded(0, 255, (OBS,), dtype=torch.uint8)
        )
        model = make_model(decoder=True)
        mlp = model.encoder.module
        model.encoder = Mod(lambda x: mlp(x / 255), ["observation"], ["latent"])
        with pytest.raises(ValueError, match="decoder writes.*float32.*uint8"):
            WorldModelEnv(model, base, decode=True)
        env = WorldModelEnv(
            model, base, observation_spec=Composite(observation=Unbounded((OBS,)))
        )
        image = torch.randint(0, 255, (3, OBS), dtype=torch.uint8)
        out = env.rollout(2, tensordict=TensorDict({"observation": image}, [3]))
        assert out["observation"].dtype == torch.float32
        expected = model.decoder.module(out["latent"][:, 0])
        assert torch.allclose(out["observation"][:, 0], expected, atol=1e-6)


class TestStartSources:
    def test_training_buffers_are_not_disturbed(self) -> None:
        """To draw starts does not advance what training draws from the same buffer."""
        buffer = ReplayBuffer(
            storage=LazyTensorStorage(10),
            sampler=SamplerWithoutReplacement(shuffle=True),
            batch_size=2,
            prefetch=2,
        )
        data = observations(10)
        buffer.extend(data.set("id", torch.arange(10)))
        env = WorldModelEnv(
            make_model(), SpecEnv(), start_states=buffer, batch_size=[3]
        )
        seen = []
        for _ in range(5):
            env.reset()
            sample = buffer.sample()
            assert sample.batch_size == (2,)
            seen += sample["id"].tolist()
        assert sorted(seen) == list(range(10))

    def test_slices_and_two_dims(self) -> None:
        flat = ReplayBuffer(
            storage=LazyTensorStorage(20),
            sampler=SliceSampler(slice_len=4, end_key=("next", "done")),
            batch_size=8,
        )
        flat.extend(transitions(20))
        square = ReplayBuffer(storage=LazyTensorStorage(20, ndim=2))
        square.extend(transitions(4, 5))
        for buffer in (flat, square):
            env = WorldModelEnv(make_model(), SpecEnv(), start_states=buffer)
            assert env.reset(TensorDict({}, [7]))["latent"].shape == (7, LATENT)
            assert env.reset()["latent"].shape == (LATENT,)

    def test_standard_pickle(self) -> None:
        buffer = ReplayBuffer(storage=LazyTensorStorage(9))
        buffer.extend(observations(9))
        for source in (observations(9), buffer, None):
            env = WorldModelEnv(make_model(), SpecEnv(), start_states=source)
            other = pickle.loads(pickle.dumps(env))
            start = None if source is not None else start_of(env.world_model, 2)
            assert other.rollout(2, tensordict=start).batch_size[-1] == 2

    def test_encoded_context_is_completed(self) -> None:
        """An encoder that also writes a context: latents alone are not enough to start."""
        model = WorldModel(
            Mod(
                lambda x: (x[..., :LATENT], x[..., :1]),
                ["observation"],
                ["latent", "task"],
            ),
            Mod(
                lambda z, c, a: z + c,
                ["latent", "task", "action"],
                [("next", "latent")],
            ),
            linear([("next", "latent")], [("next", "reward")], [LATENT, 1]),
        )
        env = WorldModelEnv(model, SpecEnv())
        start = observations(3).set("latent", torch.zeros(3, LATENT))
        out = env.rollout(2, tensordict=start)
        assert not out["latent"][:, 0].any()
        task = start["observation"][:, :1].unsqueeze(1).expand(3, 2, 1)
        assert torch.equal(out["task"], task)


def test_add_truncated_keys() -> None:
    model = make_model()
    env = WorldModelEnv(model, SpecEnv(done_names=("done",))).add_truncated_keys()
    start = start_of(model, 3)
    assert not env.reset(start)["truncated"].any()
    assert not env.imagine(2, tensordict=start)["next", "truncated"].any()
    out = env.rollout(3, tensordict=start, set_truncated=True)
    assert out["next", "truncated"].squeeze(-1).tolist() == [[False, False, True]] * 3
    model.reward_head = make_model().reward_head
    env.rollout(2, tensordict=start)


def test_repr_shows_what_the_env_is() -> None:
    env = WorldModelEnv(
        make_model(), SpecEnv(), batch_size=3, max_steps=7, start_states=observations(2)
    )
    text = repr(env)
    for part in (
        "batch_size=[3]",
        "max_steps=7",
        "start_states=TensorDict",
        "dynamics",
    ):
        assert part in text


def test_random_imagination_repeats_and_explores() -> None:
    env = WorldModelEnv(
        make_model(), SpecEnv(), batch_size=[3], start_states=observations(5)
    )
    runs = []
    for _ in range(2):
        env.set_seed(1)
        runs.append(env.imagine(4))
    assert (runs[0] == runs[1]).all()
    actions = runs[0]["action"]
    assert actions.shape == (3, 4, ACTION) and actions.flatten().unique().numel() == 24


def test_compiled_step_is_one_graph() -> None:
    model = make_model(done="terminated_logits")
    env = WorldModelEnv(model, SpecEnv(), max_steps=5)
    td = env.rand_action(env.reset(start_of(model, 3)))
    torch._dynamo.reset()
    compiled = torch.compile(env.step, fullgraph=True, backend="eager")
    out, expected = compiled(td.clone()), env.step(td.clone())
    assert (out == expected).all()


def test_a_start_that_does_not_count_is_told_why() -> None:
    model = make_model()
    env = WorldModelEnv(model, SpecEnv())
    start = model.encode(observations(2)).detach()
    with pytest.raises(RuntimeError, match="set_state=False leaves out"):
        env.rollout(2, tensordict=start, set_state=False)
    inside = TransformedEnv(env, StepCounter())
    with pytest.raises(RuntimeError, match="set_state=True where a TransformedEnv"):
        inside.rollout(2, tensordict=observations(2), set_state=True)
    assert inside.rollout(2, tensordict=start, set_state=True).batch_size == (2, 2)
