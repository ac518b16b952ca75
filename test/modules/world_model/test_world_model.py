"""The world model: composition, keys, state, and wiring errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from _models import ACTION, LATENT, linear, make_model, OBS, observations, transitions
from hypothesis import given, strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn

from torchrl_wm import WorldModel
from torchrl_wm.modules.keys import join


def test_forward_encodes_steps_and_decodes() -> None:
    model = make_model(done="terminated_logits", decoder="reconstruction")
    td = transitions(5)
    out = model(td)
    assert out is td
    latent = model.encoder.module(td["observation"])
    assert torch.equal(out["latent"], latent)
    next_latent = model.dynamics.module(latent, td["action"])
    assert torch.equal(out["next", "latent"], next_latent)
    assert torch.equal(out["next", "reward"], model.reward_head.module(next_latent))
    logits = model.done_head.module(next_latent)
    assert torch.equal(out["next", "terminated_logits"], logits)
    assert torch.equal(out["reconstruction"], model.decoder.module(latent))


def test_step_neither_encodes_nor_decodes() -> None:
    model = make_model(decoder=True)
    td = model.encode(observations(3))
    before = td["observation"].clone()
    td["action"] = torch.zeros(3, ACTION)
    td["latent"] = torch.zeros(3, LATENT)
    out = model.step(td)
    assert out is td
    assert torch.equal(out["latent"], torch.zeros(3, LATENT)), "step encoded"
    assert torch.equal(out["observation"], before), "step decoded"
    assert set(out["next"].keys()) == {"latent", "reward"}
    assert model.step_module.in_keys == ["latent", "action"]


def test_decode_without_decoder_says_what_to_pass() -> None:
    with pytest.raises(RuntimeError, match="decoder="):
        make_model().decode(observations(2))


@pytest.mark.parametrize("verb", ["encode", "observe"])
def test_observations_in_a_dictionary(verb) -> None:
    plain = {"observation": torch.zeros(3, OBS)}
    with pytest.raises(
        TypeError, match=f"WorldModel.{verb} takes a tensordict, got a dict"
    ):
        getattr(make_model(), verb)(plain)


def test_keyword_dispatch() -> None:
    model = make_model()
    td = transitions(5)
    latent, next_latent, reward = model(
        observation=td["observation"], action=td["action"]
    )
    expected = model(td.clone())
    assert torch.equal(latent, expected["latent"])
    assert torch.equal(next_latent, expected["next", "latent"])
    assert torch.equal(reward, expected["next", "reward"])


@pytest.mark.parametrize("latent", ["latent", ("deep", "latent")])
def test_latents_are_found(latent) -> None:
    assert make_model(latent=latent).latent_keys == [latent]


def test_several_latents_and_context_are_told_apart() -> None:
    model = WorldModel(
        linear(["observation"], ["state"], [OBS, LATENT]),
        Mod(
            lambda s, b, goal, a: (s + 1, b + 1),
            ["state", "belief", "goal", "action"],
            [("next", "state"), ("next", "belief")],
        ),
        linear([("next", "state")], [("next", "reward")], [LATENT, 1]),
    )
    assert model.latent_keys == ["state", "belief"]
    assert model.step_in_keys == ["state", "belief", "goal", "action"]
    assert model.in_keys == ["observation", "belief", "goal", "action"]


def test_observation_may_be_the_latent() -> None:
    model = WorldModel(
        Mod(nn.Identity(), ["observation"], ["observation"]),
        linear(
            ["observation", "action"], [("next", "observation")], [OBS + ACTION, OBS]
        ),
        linear(["observation", "action"], [("next", "reward")], [OBS + ACTION, 1]),
    )
    assert model.latent_keys == ["observation"]


def test_replaced_component_takes_effect() -> None:
    model = make_model()
    td = model.encode(observations(3)).set("action", torch.zeros(3, ACTION))
    model.step(td)
    model.reward_head = Mod(
        lambda x: torch.full_like(x[..., :1], 7.0),
        [("next", "latent")],
        [("next", "reward")],
    )
    assert (model.step(td)["next", "reward"] == 7).all()
    assert (model(transitions(3))["next", "reward"] == 7).all()
    model.done_head = linear(
        [("next", "latent")], [("next", "terminated_logits")], [LATENT, 1]
    )
    assert ("next", "terminated_logits") in model.out_keys
    model.done_head = None
    assert ("next", "terminated_logits") not in model.out_keys


def test_replacement_is_checked() -> None:
    model = make_model()
    model.reward_head = linear([("next", "wrong")], [("next", "reward")], [LATENT, 1])
    with pytest.raises(ValueError, match="reward_head reads.*wrong"):
        model(transitions(3))


def test_state_dict_holds_each_tensor_once_and_loads() -> None:
    model = make_model(done="terminated_logits", decoder=True)
    state = model.state_dict()
    pointers = [tensor.data_ptr() for tensor in state.values()]
    assert len(set(pointers)) == len(pointers) == len(list(model.parameters()))
    other = make_model(done="terminated_logits", decoder=True)
    other.load_state_dict(state)
    td = transitions(3)
    assert (model(td.clone()) == other(td.clone())).all()


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_are_independent(clone) -> None:
    model = make_model()
    td = transitions(3)
    expected = model(td.clone())
    other = clone(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (other(td.clone()) == expected).all()


@given(
    size=st.lists(st.integers(1, 3), max_size=3),
    latent=st.sampled_from(["latent", ("a", "b"), ("a", "b", "c")]),
    observation=st.sampled_from(["observation", ("agents", "observation")]),
    action=st.sampled_from(["action", ("agents", "action")]),
)
def test_any_batch_shape_and_key(size, latent, observation, action) -> None:
    model = make_model(latent=latent, observation=observation, action=action)
    td = TensorDict({}, batch_size=size)
    td.set(observation, torch.randn(*size, OBS))
    td.set(action, torch.randn(*size, ACTION))
    out = model(td)
    assert out.get(("next", latent)).shape == (*size, LATENT)
    assert out.get(("next", "reward")).shape == (*size, 1)


# Wiring errors -------------------------------------------------------------


def test_component_without_keys() -> None:
    _, dynamics, head = make_model().components.values()
    with pytest.raises(TypeError, match="encoder must be a TensorDictModule.*Linear"):
        WorldModel(nn.Linear(OBS, LATENT), dynamics, head)


def test_missing_component() -> None:
    encoder, _, head = make_model().components.values()
    with pytest.raises(TypeError, match="dynamics.*NoneType"):
        WorldModel(encoder, None, head)


def test_key_read_and_never_written() -> None:
    encoder, dynamics, _ = make_model().components.values()
    head = linear([("next", "typo")], [("next", "reward")], [LATENT, 1])
    with pytest.raises(ValueError) as err:
        WorldModel(encoder, dynamics, head)
    message = str(err.value)
    assert "reward_head" in message and "('next', 'typo')" in message
    assert "out_keys of dynamics" in message


def test_key_written_too_late() -> None:
    encoder, dynamics, _ = make_model().components.values()
    head = linear([("next", "logits")], [("next", "reward")], [LATENT, 1])
    done = linear([("next", "latent")], [("next", "logits")], [LATENT, 1])
    with pytest.raises(ValueError, match="done_head writes it only afterwards"):
        WorldModel(encoder, dynamics, head, done_head=done)


def test_key_written_twice() -> None:
    encoder, dynamics, head = make_model().components.values()
    with pytest.raises(
        ValueError, match=r"Both reward_head and done_head write \('next', 'reward'\)"
    ):
        WorldModel(encoder, dynamics, head, done_head=copy.deepcopy(head))


@pytest.mark.parametrize("latent", ["latent", ("agents", "latent")])
def test_prediction_at_the_root(latent) -> None:
    """As code for TorchRL's WorldModelWrapper has it."""
    encoder, dynamics, head = make_model(latent=latent).components.values()
    dynamics = linear([latent, "action"], [latent], [LATENT + ACTION, LATENT])
    with pytest.raises(ValueError) as err:
        WorldModel(encoder, dynamics, head)
    message = str(err.value)
    assert f"Both encoder and dynamics write {latent!r}" in message
    assert f"out_keys=[{join('next', latent)!r}]" in message
