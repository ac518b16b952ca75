"""Normalisers: fitted from data, safe before that, and saved with the model."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from _env_kinds import drawn_transitions, env_of
from _models import linear, SpecEnv
from hypothesis import given, settings, strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torchrl.data import Unbounded
from torchrl.envs import GymEnv

from torchrl_wm import WorldModel, WorldModelEnv, WorldModelLoss
from torchrl_wm.models import make_ensemble_world_model, make_mlp_world_model
from torchrl_wm.modules import (
    DenormalizedNetwork,
    Entry,
    fit_normalizers,
    NormalizedNetwork,
    Normalizer,
    TerminationHead,
)
from torchrl_wm.modules.blocks.precision import coarse_dims


def entry(key, size: int) -> Entry:
    return Entry.from_spec(key, Unbounded((size,)))


@given(
    st.sampled_from([(20,), (50,), (3, 7)]),
    st.floats(-100, 100),
    st.floats(1e-3, 1e3),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=50)
def test_fitted_data_has_mean_0_and_std_1(size, shift, scale, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(*size, 4, generator=generator, dtype=torch.float64)
    normalizer = Normalizer(4).double().fit(data * scale + shift)
    out = normalizer(data * scale + shift).reshape(-1, 4)
    assert torch.allclose(out.mean(0), torch.zeros(4).double(), atol=1e-6)
    assert torch.allclose(out.std(0, unbiased=False), torch.ones(4).double())
    back = normalizer.inverse(normalizer(data * scale + shift))
    assert torch.allclose(back, data * scale + shift, rtol=1e-6)


@pytest.mark.parametrize("constant", [0.0, 5.0, 1e6, -1e-8])
def test_constant_features_are_shifted_not_scaled(constant) -> None:
    data = torch.stack([torch.randn(100), torch.full((100,), constant)], -1)
    normalizer = Normalizer(2).fit(data)
    out = normalizer(data)
    assert out.isfinite().all() and out[:, 1].abs().max() < 1e-6
    moved = normalizer(data + torch.tensor([0.0, 1.0]))
    # The size of a float's last digit at this value is all that may be lost.
    assert (moved[:, 1] - 1).abs().max() <= abs(constant) * 1e-6 + 1e-6


def test_rounding_noise_about_zero_is_constant() -> None:
    normalizer = Normalizer(1).fit(1e-17 * torch.randn(100, 1))
    assert normalizer(torch.tensor([[1e-3]])).item() == pytest.approx(1e-3)
    small = 1e-9 * torch.randn(1000, 1)  # units may be small, though
    assert Normalizer(1).fit(small)(small).std() == pytest.approx(1, rel=0.01)


def test_large_numbers_that_change_are_scaled() -> None:
    time = 1.7e9 + torch.arange(2000, dtype=torch.float64)  # seconds since 1970
    normalizer = Normalizer(2)
    data = torch.stack([time, torch.sin(time)], -1).float()
    out = normalizer.fit(data)(data)
    torch.testing.assert_close(out.std(0), torch.ones(2), rtol=1e-3, atol=0)
    assert torch.corrcoef(torch.stack([out[:, 0].double(), time]))[0, 1] > 0.99
    last_digit = 1 + 2.0**-23 * (torch.rand(500, 1) < 0.5)  # what rounding does
    assert Normalizer(1).fit(last_digit).std.item() == 1
    large = Normalizer(1).fit(3e8 + 32.0 * (torch.rand(500, 1) < 0.5))
    assert large.std.item() == pytest.approx(16, rel=0.05)  # rounding, or not
    double = Normalizer(1).double().fit(1e9 + 5 * torch.rand(500, 1).double())
    assert double.std.item() == pytest.approx(5 / 12**0.5, rel=0.1)


@pytest.mark.parametrize("key", ["clock", ("agent", "clock")])
def test_what_is_too_large_for_single_precision_is_named_once(key) -> None:
    env = SpecEnv(observation=2, observation_key=key)
    world_model, _ = make_ensemble_world_model(
        env, members=2, hidden=(8,), termination="none"
    )
    time = 8e8 + 3 * torch.arange(401.0, dtype=torch.float64)
    clock = torch.stack([torch.sin(time), time], -1).float()
    batch = TensorDict(
        {
            key: clock[:-1],
            "action": torch.rand(400, 2),
            "next": {key: clock[1:], "reward": torch.rand(400, 1)},
        },
        [400],
    )
    with pytest.warns(UserWarning) as caught:
        fit_normalizers(world_model, batch)
    (message,) = {str(w.message) for w in caught}
    assert {w.filename for w in caught} == {__file__}
    assert message.startswith(f"{key!r} is too large") and "dims [1]" in message
    assert "the mean 8e+08 and the spread 347," in message and "64 apart" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_normalizers(world_model, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_single_precision_serves_is_not_named(dtype) -> None:
    steps = torch.arange(300, dtype=torch.float64)
    jitter = torch.randn(300, dtype=torch.float64)
    data = torch.stack(
        [
            0.02 * steps,  # a runner's position
            20 + 5 * torch.sin(steps),  # a temperature
            1 + 1e-9 * jitter,  # the norm of a quaternion
            0.5 + (steps // 100) + 1e-13 * jitter,  # a goal, another in each episode
            torch.full_like(steps, 3e9),
        ],
        -1,
    ).to(dtype)
    assert coarse_dims(data[:-1], data[1:]) == []


def test_unfitted_is_the_identity_and_warns_once() -> None:
    normalizer, value = Normalizer(3), torch.randn(5, 3)
    with pytest.warns(UserWarning, match="fit_normalizers"):
        assert torch.equal(normalizer(value), value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(normalizer(value), value)
        assert torch.equal(normalizer.inverse(value), value)
        Normalizer(3).fit(value)(value)


@pytest.mark.parametrize("copied", ["state_dict", "deepcopy", "pickle"])
def test_what_was_fitted_goes_with_the_model(copied) -> None:
    data = torch.randn(50, 3) * 4 + 1
    normalizer = Normalizer(3).fit(data)
    if copied == "state_dict":
        other = Normalizer(3)
        other.load_state_dict(normalizer.state_dict())
    elif copied == "deepcopy":
        other = copy.deepcopy(normalizer)
    else:
        other = pickle.loads(pickle.dumps(normalizer))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(other(data), normalizer(data))
    assert not list(normalizer.parameters())


def test_data_that_it_cannot_be_fitted_to_is_refused() -> None:
    normalizer = Normalizer(2)
    bad = torch.tensor([[1.0, float("nan")], [2.0, 0.0]])
    with pytest.raises(ValueError, match=r"features \[1\] hold NaN"):
        normalizer.fit(bad)
    with pytest.raises(ValueError, match=r"2 features.*\(5, 3\)"):
        normalizer.fit(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"\(0, 2\)"):
        normalizer.fit(torch.zeros(0, 2))
    assert not normalizer.fitted


def observation_model(key="observation") -> WorldModel:
    """A model over an observation whose done head and encoder normalise."""
    nested = ("deep", key) if key != "observation" else key
    latent = "latent"
    return WorldModel(
        Mod(NormalizedNetwork([entry(nested, 3)], nn.Linear(3, 4)), [nested], [latent]),
        linear([latent, "action"], [("next", latent)], [5, 4]),
        linear([("next", latent)], [("next", "reward")], [4, 1]),
        done_head=TerminationHead(
            NormalizedNetwork([entry(latent, 4)], nn.Linear(4, 1)), [("next", latent)]
        ),
    )


def transitions(*size: int, key="observation") -> TensorDict:
    nested = ("deep", key) if key != "observation" else key
    td = TensorDict({"action": torch.randn(*size, 1)}, batch_size=size)
    td.set(nested, torch.randn(*size, 3) * 7 + 3)
    following = TensorDict({"reward": torch.randn(*size, 1)}, batch_size=size)
    following.set("terminated", torch.rand(*size, 1) > 0.5)
    following.set(nested, torch.randn(*size, 3) * 7 + 3)
    return td.set("next", following)


@pytest.mark.parametrize("key", ["observation", "state"])
def test_all_normalizers_of_a_model_are_fitted(key) -> None:
    model, batch = observation_model(key), transitions(40, 5, key=key)
    before = batch.clone()
    fit_normalizers(model, batch)
    assert (batch == before).all(), "the batch was written to"
    name = ("deep", key) if key != "observation" else key
    normalizer = model.encoder.module.normalizer
    assert torch.allclose(normalizer.mean, batch[name].reshape(-1, 3).mean(0))
    # The head reads latents, which the batch lacks: those of the next observations.
    latents = model.encode(batch["next"].select(name))["latent"].reshape(-1, 4)
    head = model.done_head.module.network.normalizer
    assert torch.allclose(head.mean, latents.mean(0), atol=1e-6)


def test_outputs_are_fitted_to_what_they_predict() -> None:
    model, batch = observation_model(), transitions(200)
    batch["next", "reward"] = batch["next", "reward"] * 30 + 500
    reward = DenormalizedNetwork(nn.Linear(4, 1), [entry("reward", 1)])
    model.reward_head = Mod(reward, ["latent"], [("next", "reward")])
    state = DenormalizedNetwork(
        nn.Linear(4, 4), [entry("observation", 3), entry(("deep", "x"), 1)]
    )
    model.decoder = Mod(state, ["latent"], ["observation", ("deep", "x")])
    batch["deep", "x"] = 1e-3 * torch.randn(200, 1)
    fit_normalizers(model, batch)
    assert torch.allclose(reward.normalizer.mean, batch["next", "reward"].mean(0))
    assert torch.allclose(reward.scale("reward"), reward.normalizer.std)
    assert torch.allclose(state.normalizer.mean[:3], batch["observation"].mean(0))
    assert torch.allclose(
        state.scale(("deep", "x")), batch["deep", "x"].std(0, unbiased=False)
    )
    vector = reward.network(torch.zeros(4)).detach()
    out = reward(torch.zeros(4))
    assert torch.allclose(
        (out - reward.normalizer.mean) / reward.scale("reward"), vector
    )
    plain = DenormalizedNetwork(nn.Linear(4, 1), [entry("x", 1)], normalize=False)
    assert plain.scale("x") == 1 and plain(torch.zeros(4)).shape == (1,)


def test_padding_is_left_out() -> None:
    model, batch = observation_model(), transitions(10)
    mask = torch.arange(10) < 6
    batch["observation"][6:] = float("nan")
    batch["next", "observation"][6:] = float("nan")
    batch.set(("collector", "mask"), mask)
    fit_normalizers(model, batch)
    normalizer = model.encoder.module.normalizer
    assert torch.allclose(normalizer.mean, batch["observation"][:6].mean(0))
    batch.set(("collector", "mask"), torch.zeros(10, dtype=torch.bool))
    with pytest.raises(ValueError, match="nothing to fit or compare"):
        fit_normalizers(model, batch)


def test_missing_entries_are_named() -> None:
    batch = transitions(10).exclude("observation")
    with pytest.raises(KeyError, match="fitted to \\['observation'\\]"):
        fit_normalizers(observation_model(), batch)


def test_fitting_reaches_a_loss_made_before() -> None:
    model, batch = observation_model(), transitions(30)
    loss = WorldModelLoss(model, losses=["done"])
    with pytest.warns(UserWarning):
        before = loss(batch)["loss_done"]
    fit_normalizers(model, batch)
    after = loss(batch)["loss_done"]
    assert not torch.equal(before, after)
    fresh = WorldModelLoss(copy.deepcopy(model), losses=["done"])
    assert torch.equal(after, fresh(batch)["loss_done"])


def test_it_compiles_to_one_graph() -> None:
    normalizer, value = Normalizer(3), torch.randn(5, 3)
    compiled = torch.compile(normalizer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(value), value)
    normalizer.fit(value)
    assert torch.allclose(compiled(value), normalizer(value))


def test_making_an_env_is_no_use_and_does_not_warn(recwarn):
    env = GymEnv("Pendulum-v1")
    world_model, _ = make_ensemble_world_model(env, members=2, hidden=(8,))
    imagined = WorldModelEnv(world_model, env)
    assert not [w for w in recwarn if "normaliser" in str(w.message)]
    with pytest.warns(UserWarning, match="before it is fitted"):
        imagined.rollout(2, tensordict=env.reset())


def unfitted(caught) -> int:
    return sum("before it is fitted" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("make", [make_ensemble_world_model, make_mlp_world_model])
def test_an_unfitted_model_warns_once(make, nested, recwarn):
    """It has a normaliser for each network, and one call fits them all."""
    env = env_of("nested" if nested else "vector", "bounded", nested=nested)
    batch = drawn_transitions(env, 5)
    world_model, loss = make(env)
    loss(batch), loss(batch), world_model(batch.exclude("next"))
    assert unfitted(recwarn) == 1
    copy.deepcopy(world_model)(batch.exclude("next"))
    WorldModelEnv(world_model, env)  # says nothing, and takes back no notice
    loss(batch)
    assert unfitted(recwarn) == 1
    make(env)[1](batch)
    assert unfitted(recwarn) == 2, "another model warns for itself"


def test_fitted_statistics_that_come_as_weights_do_not_warn(recwarn):
    """As collectors hand weights on."""
    env = env_of("vector", "bounded")
    batch = drawn_transitions(env, 5)
    trained, _ = make_ensemble_world_model(env)
    fit_normalizers(trained, batch)
    other, _ = make_ensemble_world_model(env)
    TensorDict.from_module(trained).data.clone().to_module(other)
    other(batch.exclude("next"))
    assert not unfitted(recwarn)


def test_stacked_models_run_under_vmap(recwarn):
    models = [Normalizer(2), Normalizer(2)]
    weights = TensorDict.from_modules(*models, as_module=False)
    base = Normalizer(2).to("meta")

    def run(parameters, value):
        with parameters.to_module(base):
            return base(value)

    value = torch.randn(5, 2)
    out = torch.vmap(run, (0, None))(weights, value)
    assert torch.equal(out, value.expand(2, 5, 2)) and unfitted(recwarn) == 1
