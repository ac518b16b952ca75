"""Recurrent models: initial states, filtering, and the front of a policy."""

from __future__ import annotations

import pytest
import torch
from _models import (
    ACTION,
    BELIEF,
    gru_model,
    LATENT,
    linear,
    make_model,
    OBS,
    observations,
    rssm_model,
    SpecEnv,
)
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Composite, Unbounded
from torchrl.envs import InitTracker, SerialEnv, TransformedEnv
from torchrl.envs.utils import check_env_specs
from torchrl.modules.models.model_based import RSSMRollout, RSSMRolloutV3

from torchrl_wm import WorldModel, WorldModelEnv
from torchrl_wm.modules import InitialState

MODELS = {
    "gru": gru_model,
    "rssm": rssm_model,
    "rssm-v3": lambda: rssm_model(3),
}


@pytest.fixture(params=MODELS)
def model(request) -> WorldModel:
    return MODELS[request.param]()


def sequences(*size: int) -> TensorDict:
    """Sequences whose next observations are the observations one step later."""
    length = size[-1]
    observation = torch.randn(*size[:-1], length + 1, OBS)
    return TensorDict(
        {
            "observation": observation[..., :-1, :],
            "action": torch.rand(*size, ACTION),
            "next": {
                "observation": observation[..., 1:, :],
                "reward": torch.randn(*size, 1),
            },
        },
        batch_size=size,
    )


def seeded(function, *args):
    torch.manual_seed(7)
    return function(*args)


class TestInitialState:
    values = {"belief": torch.full((BELIEF,), 0.5)}

    @pytest.mark.parametrize(
        "source",
        [
            TensorDict(values),
            values,
            TensorDict({"belief": nn.Parameter(values["belief"])}),
            lambda size: TensorDict({"belief": torch.full((*size, BELIEF), 0.5)}, size),
        ],
        ids=["tensordict", "mapping", "parameter", "function"],
    )
    @pytest.mark.parametrize("size", [(), (3,), (2, 3)])
    def test_forms(self, source, size) -> None:
        base = gru_model()
        model = WorldModel(
            base.encoder, base.dynamics, base.reward_head, initial_state=source
        )
        td = model.encode(observations(*size))
        assert torch.equal(td["belief"], torch.full((*size, BELIEF), 0.5))
        assert td["latent"].shape == (*size, LATENT)

    def test_composite_is_zeros(self) -> None:
        base = gru_model()
        spec = Composite(belief=Unbounded((BELIEF,)))
        model = WorldModel(
            base.encoder, base.dynamics, base.reward_head, initial_state=spec
        )
        assert not model.encode(observations(3))["belief"].any()

    def test_module_is_trained(self) -> None:
        class Learned(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.value = nn.Parameter(torch.ones(BELIEF))

            def forward(self, tensordict):
                size = tensordict.batch_size
                return tensordict.set("belief", self.value.expand(*size, BELIEF))

        learned = Learned()
        learned.in_keys, learned.out_keys = [], ["belief"]
        base = gru_model()
        model = WorldModel(
            base.encoder, base.dynamics, base.reward_head, initial_state=learned
        )
        env = WorldModelEnv(model, SpecEnv())
        out = env.rollout(3, tensordict=observations(2))
        out["next", "reward"].sum().backward()
        assert learned.value.grad.any()
        assert any(p is learned.value for p in model.parameters())

    def test_values_are_part_of_the_state(self) -> None:
        model, other = gru_model(), gru_model()
        next(other.initial_state.buffers()).fill_(9.0)
        model.load_state_dict(other.state_dict())
        assert (model.encode(observations(2))["belief"] == 9).all()

    def test_given_latents_are_kept(self) -> None:
        td = observations(3).set("belief", torch.zeros(3, BELIEF))
        assert not gru_model().encode(td)["belief"].any()

    def test_inputs_of_the_model(self) -> None:
        assert gru_model().in_keys == ["observation", "action"]

    def test_awkward_names(self) -> None:
        """Latents may be called as modules' own attributes are, or have dots."""
        for name in ("module", "names", "training", "a.b", ("deep", "keys")):
            state = InitialState({name: torch.ones(2)})
            assert state.keys() == [name]
            assert state(torch.Size([3]))[name].shape == (3, 2)

    def test_values_that_no_latent_needs(self) -> None:
        base = gru_model()
        for key in ("memory", "latent"):
            with pytest.raises(ValueError, match=rf"\['{key}'\].*are \['belief'\]"):
                WorldModel(
                    base.encoder,
                    base.dynamics,
                    base.reward_head,
                    initial_state={key: torch.zeros(BELIEF)},
                )
        for source in ({}, TensorDict({"belief": torch.zeros(4, BELIEF)}, [4])):
            with pytest.raises(ValueError, match="without batch dims"):
                InitialState(source)

    def test_bad_source(self) -> None:
        base = gru_model()
        with pytest.raises(TypeError, match="initial_state must be.*int"):
            WorldModel(base.encoder, base.dynamics, base.reward_head, initial_state=3)

    def test_function_of_another_batch_size(self) -> None:
        base = gru_model()
        model = WorldModel(
            base.encoder,
            base.dynamics,
            base.reward_head,
            initial_state=lambda size: TensorDict({"belief": torch.zeros(7, BELIEF)}),
        )
        with pytest.raises(ValueError, match=r"'belief' of shape \(7, 5\).*\(3,\)"):
            model.encode(observations(3))


class TestEnv:
    @pytest.mark.parametrize("size", [(), (3,)])
    def test_specs(self, model, size) -> None:
        env = WorldModelEnv(
            model, SpecEnv(), batch_size=size, start_states=observations(9)
        )
        check_env_specs(env)
        assert set(env.observation_spec.keys()) == set(model.latent_keys)

    def test_starts_from_observations_and_every_latent_moves(self, model) -> None:
        env = WorldModelEnv(model, SpecEnv())
        out = env.rollout(4, tensordict=observations(3))
        assert (out["next", "belief"] != out["belief"]).any(-1).all()
        for key in model.latent_keys:
            assert (out["next", key] != out[key]).any(), key
            assert torch.equal(out[key][:, 1:], out["next", key][:, :-1])

    def test_the_posterior_is_not_run_while_imagining(self) -> None:
        model = rssm_model()
        env = WorldModelEnv(model, SpecEnv())
        start = model.encode(observations(3))
        model.posterior.module.forward = None  # calling it would raise
        env.rollout(4, tensordict=start)

    def test_missing_latent_names_the_fix(self) -> None:
        base = gru_model()
        model = WorldModel(base.encoder, base.dynamics, base.reward_head)
        with pytest.raises(
            ValueError, match="'belief' cannot be inferred.*initial_state="
        ):
            WorldModelEnv(model, SpecEnv())
        spec = Composite(belief=Unbounded((BELIEF,)))
        env = WorldModelEnv(model, SpecEnv(), observation_spec=spec)
        with pytest.raises(KeyError, match="lacks 'belief'.*initial_state="):
            env.reset(observations(3))


class TestFiltering:
    def test_equals_torchrl_rssm_rollout(self) -> None:
        model, data = rssm_model(), sequences(2, 6)
        data["state"] = torch.randn(2, 6, 3)
        data["belief"] = torch.randn(2, 6, BELIEF)
        out = seeded(model.observe, data)
        given = data.clone()
        given["next", "encoded_latents"] = model.encoder.module(
            data["next", "observation"]
        )
        rollout = RSSMRollout(model.dynamics, model.posterior)
        expected = seeded(rollout, given)
        for key in ("state", "belief", "prior_mean", "posterior_mean", "posterior_std"):
            assert torch.equal(out["next", key], expected["next", key]), key
        assert torch.equal(out["state"][:, 1:], out["next", "state"][:, :-1])

    def test_equals_torchrl_rssm_v3_rollout(self) -> None:
        model, data = rssm_model(3), sequences(2, 6)
        data["state"] = torch.zeros(2, 6, 6)
        data["belief"] = torch.zeros(2, 6, BELIEF + 3)
        given = data.clone()
        given["next", "encoded_latents"] = model.encoder.module(
            data["next", "observation"]
        )
        rollout = RSSMRolloutV3(model.dynamics, model.posterior, reset_key=None)
        rollout._fast_path = False  # it draws its noise in another order
        out, expected = seeded(model.observe, data), seeded(rollout, given)
        for key in ("state", "belief", "prior_logits", "posterior_logits"):
            assert torch.equal(out["next", key], expected["next", key]), key

    def test_gru_equals_a_hand_loop(self) -> None:
        model, data = gru_model(), sequences(2, 5)
        out = model.observe(data)
        belief = torch.full((2, BELIEF), 0.5)
        for t in range(5):
            latent = model.encoder.module(data["observation"][:, t])
            torch.testing.assert_close(out["latent"][:, t], latent)
            assert torch.equal(out["belief"][:, t], belief)
            predicted, belief = model.dynamics.module(
                out["latent"][:, t], belief, data["action"][:, t]
            )
            assert torch.equal(out["next", "latent"][:, t], predicted)
            assert torch.equal(out["next", "belief"][:, t], belief)

    def test_input_is_not_modified(self, model) -> None:
        data = sequences(2, 4)
        keys, before = set(data.keys(True, True)), data.clone()
        model.observe(data)
        assert set(data.keys(True, True)) == keys and (data == before).all()

    @pytest.mark.parametrize("size", [(4,), (2, 4), (2, 3, 4)])
    def test_any_batch_shape(self, model, size) -> None:
        if len(size) == 3 and model.posterior is not None:
            pytest.skip("TorchRL's RSSM takes one batch dim at most")
        out = model.observe(sequences(*size))
        for key in model.latent_keys:
            assert out[key].shape[: len(size)] == size

    def test_gradients_reach_every_part(self, model) -> None:
        out = model.observe(sequences(2, 4))
        sum(out["next", key].sum() for key in model.latent_keys).backward()
        parts = [model.encoder, model.dynamics]
        parts += [] if model.posterior is None else [model.posterior]
        for part in parts:
            grads = [p.grad for p in part.parameters()]
            assert any(grad is not None and grad.any() for grad in grads)

    def test_sequences_that_do_not_fit(self) -> None:
        model = gru_model()
        with pytest.raises(KeyError, match=r"\('next', 'observation'\)"):
            model.observe(sequences(2, 3).exclude(("next", "observation")))
        with pytest.raises(ValueError, match=r"\[\*B, T\].*\(2, 0\)"):
            model.observe(sequences(2, 3)[:, :0])
        data = sequences(2, 3)
        data["action"] = torch.zeros(2, 3, ACTION + 1)
        with pytest.raises(RuntimeError, match="dynamics failed on.*'action'"):
            model.observe(data)

    @pytest.mark.parametrize("flat", [False, True])
    def test_restarts_where_an_episode_begins(self, flat) -> None:
        """After is_init, a sequence is as if what comes before it were not there."""
        model, data = gru_model(), sequences(2, 6)
        is_init = torch.zeros(2, 6, 1, dtype=torch.bool)
        is_init[0, 3] = True
        data["is_init"] = is_init.squeeze(-1) if flat else is_init
        out = model.observe(data)
        tail = model.observe(data[:1, 3:].exclude("is_init"))
        for key in ("latent", "belief"):
            torch.testing.assert_close(out[key][:1, 3:], tail[key])
        whole = model.observe(data[1:].exclude("is_init"))
        torch.testing.assert_close(out["belief"][1:], whole["belief"])

    def test_without_is_init_an_episode_begins_after_a_done(self) -> None:
        model, data = gru_model(), sequences(2, 6)
        data["next", "done"] = torch.zeros(2, 6, 1, dtype=torch.bool)
        data["next", "done"][0, 2] = True
        belief = model.observe(data)["belief"]
        assert (belief[0, 3] == 0.5).all() and (belief[1, 3] != 0.5).all()
        tail = model.observe(data[:1, 3:])["belief"]
        torch.testing.assert_close(belief[:1, 3:], tail)

    def test_is_init_of_the_agents(self) -> None:
        model, data = gru_model(), sequences(2, 6)
        flags = torch.zeros(2, 6, 3, 1, dtype=torch.bool)
        flags[0, 3] = True  # all agents
        flags[1, 3, 0] = True  # one of them
        data["agents", "is_init"] = flags
        belief = model.observe(data)["belief"]
        assert (belief[0, 3] == 0.5).all() and (belief[1, 3] != 0.5).all()

    def test_partly_given_latents_are_completed(self) -> None:
        model, data = gru_model(), sequences(2, 3)
        data["belief"] = torch.ones(2, 3, BELIEF)
        out = model.observe(data)
        assert (out["belief"][:, 0] == 1).all()
        expected = model.encoder.module(data["observation"][:, 0])
        torch.testing.assert_close(out["latent"][:, 0], expected)

    def test_given_latents_start_the_sequence_unless_it_begins_an_episode(self) -> None:
        model, data = gru_model(), sequences(2, 3)
        data["latent"] = torch.ones(2, 3, LATENT)
        data["belief"] = torch.ones(2, 3, BELIEF)
        assert (model.observe(data)["belief"][:, 0] == 1).all()
        data["is_init"] = torch.tensor([[True, False, False], [False, False, False]])
        belief = model.observe(data)["belief"][:, 0]
        assert (belief[0] == 0.5).all() and (belief[1] == 1).all()

    def test_root_style_posterior(self) -> None:
        base = rssm_model()
        posterior = Mod(
            base.posterior.module,
            ["belief", "encoded_latents"],
            ["posterior_mean", "posterior_std", "state"],
        )
        model = WorldModel(
            base.encoder,
            base.dynamics,
            base.reward_head,
            posterior=posterior,
            initial_state=base.initial_state(()),
        )
        data = sequences(2, 4)
        expected, out = seeded(base.observe, data), seeded(model.observe, data)
        for key in ("state", "belief", "posterior_mean"):
            assert torch.equal(out["next", key], expected["next", key])

    def test_missing_entries(self) -> None:
        model = gru_model()
        with pytest.raises(KeyError, match=r"observe reads \['action'\]"):
            model.observe(sequences(2, 3).exclude("action"))
        with pytest.raises(KeyError, match=r"observe reads \['observation'\]"):
            model.observe(TensorDict({"action": torch.zeros(2, ACTION)}, [2]))
        base = gru_model()
        bare = WorldModel(base.encoder, base.dynamics, base.reward_head)
        with pytest.raises(
            KeyError, match=r"latents \['belief'\] begin.*initial_state="
        ):
            bare.observe(sequences(2, 3))


class TestPolicyFront:
    def actor(self, model) -> Mod:
        size = model.encode(observations(1))["belief"].shape[-1]
        return linear(["belief"], ["action"], [size, ACTION])

    def real_env(self) -> TransformedEnv:
        return TransformedEnv(NoisyEnv(), InitTracker())

    @pytest.mark.parametrize("primed", [False, True])
    def test_one_step_at_a_time_equals_the_sequence(self, primed) -> None:
        """What the policy saw in the env is what training sees in the data."""
        model = gru_model()
        observer = model.observer()
        env = self.real_env()
        if primed:
            primer = observer.make_tensordict_primer(observations())
            env = env.append_transform(primer)
        with torch.no_grad():
            data = env.rollout(6, TensorDictSequential(observer, self.actor(model)))
            filtered = model.observe(data.exclude("latent", "belief", "is_init"))
        for key in ("latent", "belief"):
            torch.testing.assert_close(data[key], filtered[key])

    def test_rssm_front(self, model) -> None:
        observer = model.observer()
        with torch.no_grad():
            env = self.real_env().append_transform(
                observer.make_tensordict_primer(observations(2))
            )
            data = env.rollout(6, TensorDictSequential(observer, self.actor(model)))
        moved = data["belief"][1:] != data["belief"][:-1]
        assert moved.any(-1).all()

    def test_collector_restarts_with_each_episode(self) -> None:
        model = gru_model()
        observer = model.observer()
        env = TransformedEnv(SerialEnv(2, lambda: NoisyEnv(length=4)), InitTracker())
        env = env.append_transform(observer.make_tensordict_primer(observations()))
        policy = TensorDictSequential(observer, self.actor(model))
        with torch.no_grad():
            collector = Collector(env, policy, frames_per_batch=22, total_frames=22)
            data = next(iter(collector))
            collector.shutdown()
        assert data.batch_size == (2, 11)
        begins = data["is_init"].squeeze(-1)
        assert begins.sum() == 6  # every 4 steps in both envs
        assert (data["belief"][begins] == 0.5).all()
        assert (data["belief"][~begins] != 0.5).all()
        with torch.no_grad():
            filtered = model.observe(data.exclude("belief", "latent"))
        torch.testing.assert_close(filtered["belief"], data["belief"])

    def test_forgotten_action_is_an_error(self) -> None:
        model = gru_model()
        td = model.encode(observations(2))
        observer = model.observer()
        with pytest.raises(KeyError, match=r"\['action'\].*exclude_action=False"):
            observer(td.clone())
        with pytest.raises(KeyError, match="is_init"):
            observer(td.clone().set("is_init", torch.tensor([[True], [False]])))
        observer(td.set("is_init", torch.ones(2, 1, dtype=torch.bool)))

    def test_latent_that_the_env_overwrites(self) -> None:
        base = gru_model()
        model = WorldModel(
            Mod(nn.Identity(), ["latent"], ["latent"]),
            base.dynamics,
            base.reward_head,
            initial_state={"belief": torch.zeros(BELIEF)},
        )
        with pytest.raises(
            ValueError, match=r"\['latent'\] are what the encoder reads"
        ):
            model.observer()

    def test_without_recurrence_it_is_the_encoder(self) -> None:
        model = make_model()
        td = observations(3)
        expected = model.encoder.module(td["observation"])
        assert torch.equal(model.observer()(td)["latent"], expected)

    def test_primer_for_nested_latents(self) -> None:
        example = TensorDict(
            {"agents": TensorDict({"observation": torch.zeros(3, OBS)}, [3])}
        )
        next_latent = ("next", "agents", "belief")
        model = WorldModel(
            linear([("agents", "observation")], [("agents", "code")], [OBS, LATENT]),
            linear([("agents", "belief"), "action"], [next_latent], [LATENT, LATENT]),
            linear([next_latent], [("next", "reward")], [LATENT, 1]),
            initial_state={("agents", "belief"): torch.zeros(3, LATENT)},
        )
        primer = model.observer().make_tensordict_primer(example, reset_key="_reset")
        assert primer.primers["agents"].shape == (3,)
        assert primer.primers["agents", "belief"].shape == (3, LATENT)
        assert primer.reset_key == "_reset"

    def test_unknown_shapes_are_asked_for(self) -> None:
        with pytest.raises(ValueError, match=r"\['latent'\].*make_tensordict_primer\("):
            gru_model().observer().make_tensordict_primer()


class NoisyEnv(SpecEnv):
    """A real env of random observations and episodes of a given length."""

    def __init__(self, length: int = 100) -> None:
        super().__init__()
        self.length, self.time = length, 0

    def _reset(self, tensordict, **kwargs):
        self.time = 0
        return TensorDict({"observation": torch.randn(OBS)})

    def _step(self, tensordict):
        self.time += 1
        done = torch.tensor([self.time >= self.length])
        return TensorDict(
            {
                "observation": torch.randn(OBS),
                "reward": torch.zeros(1),
                "done": done,
                "terminated": done.clone(),
                "truncated": torch.zeros(1, dtype=torch.bool),
            }
        )


class TestWiring:
    def posterior(self, in_keys, out_keys):
        base = rssm_model()
        return lambda: WorldModel(
            base.encoder,
            base.dynamics,
            base.reward_head,
            posterior=Mod(base.posterior.module, in_keys, out_keys),
            initial_state=base.initial_state(()),
        )

    def test_posterior_reads_what_nobody_writes(self) -> None:
        make = self.posterior(
            [("next", "belief"), ("next", "typo")], ["_", "_", ("next", "state")]
        )
        with pytest.raises(ValueError, match=r"posterior reads \('next', 'typo'\)"):
            make()

    def test_posterior_mixes_places(self) -> None:
        make = self.posterior(
            [("next", "belief"), "encoded_latents"], ["_", "_", ("next", "state")]
        )
        with pytest.raises(ValueError, match="some below 'next' and some not"):
            make()

    def test_posterior_corrects_nothing(self) -> None:
        make = self.posterior(
            [("next", "belief"), ("next", "encoded_latents")],
            ["_", "_", ("next", "other")],
        )
        with pytest.raises(ValueError, match="none of which is a latent"):
            make()


def test_repr_shows_components_keys_and_counts() -> None:
    text = repr(rssm_model())
    for name in ("encoder", "dynamics", "posterior", "initial_state"):
        assert f"\n  {name} " in text
    assert "['state', 'belief']" in text
    count = sum(p.numel() for p in rssm_model().parameters())
    assert f"parameters={count:,}" in text
    assert "lazy" in repr(
        WorldModel(
            make_model().encoder,
            make_model().dynamics,
            Mod(nn.LazyLinear(1), [("next", "latent")], [("next", "reward")]),
        )
    )
