"""The limit that is read off recorded data."""

from __future__ import annotations

import pytest
import torch
from _models import gru_model, make_model, SpecEnv, transitions
from hypothesis import given, settings, strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn

from torchrl_wm import WorldModel
from torchrl_wm.models import make_ensemble_world_model
from torchrl_wm.modules import (
    data_limit,
    fit_normalizers,
    with_penalty,
    with_propagation,
)
from torchrl_wm.modules.keys import join

KEYS = ["spread", ("group", "spread")]


def sizing(key="spread", observation="observation") -> WorldModel:
    """A model whose doubt is its first observation."""
    ahead = join("next", observation)
    return WorldModel(
        Mod(nn.Identity(), [observation], [observation]),
        Mod(
            lambda x, a: (x, x[..., :1].clone()),
            [observation, "action"],
            [ahead, join("next", key)],
        ),
        Mod(lambda x: x[..., :1].clone(), [ahead], [("next", "reward")]),
    )


def numbered(values: torch.Tensor, observation="observation") -> TensorDict:
    data = TensorDict({"action": torch.zeros(*values.shape, 1)}, values.shape)
    return data.set(observation, values.unsqueeze(-1))


@settings(max_examples=50)
@given(data=st.data())
def test_so_many_rows_are_within_the_limit(data) -> None:
    size = data.draw(st.sampled_from([(1,), (7,), (3, 5), (2, 3, 4)]))
    key = data.draw(st.sampled_from(KEYS))
    observation = data.draw(st.sampled_from(["observation", ("group", "observation")]))
    share = data.draw(st.floats(0.01, 1.0))
    values = torch.randn(*size)
    limit = data_limit(
        sizing(key, observation),
        numbered(values, observation),
        share,
        measure=key,
        chunk=data.draw(st.sampled_from([1, 2, 100])),
    )
    within = (values <= limit).float().mean().item()
    assert within >= share - 1e-6
    below = (values < limit).float().mean().item()
    assert below < share


@pytest.mark.parametrize("measure", ["disagreement", "deviation"])
@pytest.mark.parametrize("propagation", ["ts1", "tsinf", "mean"])
def test_of_an_ensemble(propagation, measure) -> None:
    model, _ = make_ensemble_world_model(
        SpecEnv(), members=3, hidden=(8,), propagation=propagation
    )
    data = transitions(5, 20)
    fit_normalizers(model, data)
    before = torch.get_rng_state()
    limit = data_limit(model, data, 0.9, measure=measure, chunk=7)
    assert torch.equal(before, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    careful = with_penalty(
        with_propagation(model, "mean"), 0.0, measure=measure, limit=limit
    )
    out = careful.step(data.exclude("next"))["next"]
    assert (out[measure] > limit).sum() == 10
    assert data_limit(careful, data, 0.9, measure=measure) == pytest.approx(limit)
    assert ("next", measure) not in data.keys(True)


def test_float64_is_not_rounded_below_what_was_read() -> None:
    data = numbered(torch.tensor([0.1, 0.3, 0.7], dtype=torch.float64))
    assert data_limit(sizing(), data, 1.0, measure="spread") == 0.7


def test_padding_is_left_out() -> None:
    data = numbered(torch.arange(10.0).reshape(2, 5))
    data.set(("collector", "mask"), torch.arange(10).reshape(2, 5) < 7)
    assert data_limit(sizing(), data, 1.0, measure="spread") == 6.0


def test_a_recurrent_model_needs_filtered_data() -> None:
    model = gru_model()
    model.reward_head = Mod(
        lambda x: (x[..., :1], x[..., 1:2]),
        [("next", "belief")],
        [("next", "reward"), ("next", "doubt")],
    )
    data = transitions(2, 5)
    with pytest.raises(ValueError, match="depend on all that was observed.*observe"):
        data_limit(model, data, measure="doubt")
    assert data_limit(model, model.observe(data).exclude("next"), measure="doubt") < 9


def test_encoded_latents_and_a_measure_of_the_reward_head() -> None:
    model = make_model()
    model.reward_head = Mod(
        lambda x: (x[..., :1], x.norm(dim=-1, keepdim=True)),
        [("next", "latent")],
        [("next", "reward"), ("next", "doubt")],
    )
    data = transitions(20)
    expected = model(data.clone())["next", "doubt"].max().item()
    assert data_limit(model, data, 1.0, measure="doubt") == pytest.approx(expected)


def test_wrong_arguments_are_named() -> None:
    data = numbered(torch.arange(4.0))
    for share in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match="quantile=.* is a share of the data"):
            data_limit(sizing(), data, share, measure="spread")
    with pytest.raises(TypeError, match="quantile must be a number"):
        data_limit(sizing(), data, "all", measure="spread")
    with pytest.raises(ValueError, match="chunk must be a positive int"):
        data_limit(sizing(), data, measure="spread", chunk=0)
    with pytest.raises(ValueError, match=r"writes the measure \('next', 'doubt'\)"):
        data_limit(sizing(), data, measure="doubt")
    with pytest.raises(KeyError, match=r"lack \['action'\]"):
        data_limit(sizing(), data.exclude("action"), measure="spread")
    with pytest.raises(ValueError, match="nothing to fit or compare"):
        data_limit(sizing(), data[:0], measure="spread")
    data["observation"][1] = float("nan")
    with pytest.raises(ValueError, match="infinite on 1 of 4 transitions"):
        data_limit(sizing(), data, measure="spread")
