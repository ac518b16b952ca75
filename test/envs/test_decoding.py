"""Decoded observations as real envs show them: bytes, bits and choices, rounded and clamped."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from _models import SpecEnv
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod, TensorDictSequential
from torch import nn
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    TensorSpec,
    Unbounded,
)

from torchrl_wm import WorldModel, WorldModelEnv

KEYS = ["seen", ("robot", "eye", "seen")]
BYTES = [-3.2, 2.5, 2.6, 254.4, 1e9]
CASES = {
    # spec, what is decoded, what is shown
    "bytes": (Unbounded((5,), dtype=torch.uint8), BYTES, [0, 2, 3, 254, 255]),
    "few bytes": (Bounded(1, 200, (5,), dtype=torch.uint8), BYTES, [1, 2, 3, 200, 200]),
    "counts": (
        Bounded(-3, 9, (5,), dtype=torch.int32),
        [-7.0, -2.6, 0.4, 8.7, 9e9],
        [-3, -3, 0, 9, 9],
    ),
    "long": (
        Unbounded((5,), dtype=torch.int64),
        [-1e30, -1.0, 0.2, 2.0**40, 1e30],
        [-(2**63), -1, 0, 2**40, 2**63 - 1024],
    ),
    "bits": (Binary(5), [-9.0, 0.49, 0.51, 1.0, 7.0], [0, 0, 1, 1, 1]),
    "flags": (
        Categorical(2, (5,), dtype=torch.bool),
        [-9.0, 0.49, 0.51, 1.0, 7.0],
        [0, 0, 1, 1, 1],
    ),
    "one-hot": (OneHot(5), [-9.0, -2.0, -1.5, -3.0, -2.0], [0, 0, 1, 0, 0]),
    "one-hot integers": (
        OneHot(5, dtype=torch.int64),
        [0.4, 0.1, 0.0, 0.4, 0.3],
        [1, 0, 0, 0, 0],
    ),
    "two choices": (
        MultiOneHot([2, 3]),
        [0.2, 0.3, 9.0, 9.5, -1.0],
        [0, 1, 0, 1, 0],
    ),
    "numbers": (Categorical(4, (5,)), [-1.0, 0.6, 2.4, 3.2, 8.0], [0, 1, 2, 3, 3]),
    "numbers of several": (
        MultiCategorical([2, 3, 4, 5, 6]),
        [8.0, 8.0, 8.0, 8.0, 2.6],
        [1, 2, 3, 4, 3],
    ),
}


class Shown(nn.Module):
    """Numbers in the units of the env, wherever the latent is."""

    in_env_units = True

    def __init__(self, values: list[float], shape: tuple[int, ...] = (5,)) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values).reshape(shape))

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        zero = (
            (0.0 * latent).sum(-1).reshape(*latent.shape[:-1], *[1] * self.values.ndim)
        )
        return self.values + zero


def base_env(spec: TensorSpec, key) -> SpecEnv:
    base = SpecEnv()
    observation = Composite(shape=(), start=Unbounded((2,)))
    observation[key] = spec.clone()
    base.observation_spec = observation
    return base


def made(spec: TensorSpec, key, decoder, **kwargs) -> WorldModelEnv:
    model = WorldModel(
        Mod(nn.Linear(2, 3), ["start"], ["latent"]),
        Mod(lambda z, a: z + a.mean(), ["latent", "action"], [("next", "latent")]),
        Mod(lambda z: z[..., :1], [("next", "latent")], [("next", "reward")]),
        decoder=decoder,
    )
    starts = TensorDict({"start": torch.randn(6, 2)}, [6])
    kwargs = {"decode": True, "start_states": starts, "batch_size": [4], **kwargs}
    return WorldModelEnv(model, base_env(spec, key), **kwargs)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("name", sorted(CASES))
def test_what_is_shown_fits_the_real_envs_spec(name, key) -> None:
    spec, decoded, shown = CASES[name]
    env = made(spec, key, Mod(Shown(decoded), ["latent"], [key]))
    assert env.observation_spec[key] == spec.expand(4, *spec.shape)
    env.check_env_specs()
    expected = torch.tensor(shown).to(spec.dtype).expand(4, 5)
    for out in (env.rollout(3), env.imagine(3)):
        for entry in (out[key], out.get("next")[key]):
            assert entry.dtype == spec.dtype
            assert torch.equal(entry[:, 1], expected)
    # The caller's own start is shown as it is.
    own = spec.rand((4,))
    start = TensorDict({"start": torch.randn(4, 2)}, [4])
    start[key] = own
    assert torch.equal(env.reset(start)[key], own)


def test_images_of_bytes_under_a_nested_key_and_a_decoder_of_several_parts() -> None:
    spec = Bounded(0, 255, (2, 4, 3), dtype=torch.uint8)
    values = torch.linspace(-20, 270, 24)
    key = ("robot", "eye", "seen")
    decoder = TensorDictSequential(
        Mod(lambda z: 2 * z, ["latent"], ["hidden"]),
        Mod(Shown(values.tolist(), (2, 4, 3)), ["hidden"], [key]),
    )
    env = made(spec, key, decoder)
    out = env.imagine(2)["next"]
    expected = values.round().clamp(0, 255).to(torch.uint8).reshape(2, 4, 3)
    assert torch.equal(out[key][0, 0], expected)
    assert torch.equal(copy.deepcopy(env).imagine(2)["next"][key], out[key])


def test_of_other_decoders_it_is_not_known_what_their_floats_are() -> None:
    spec, decoded, shown = CASES["bytes"]
    decoder = Mod(nn.Linear(3, 5), ["latent"], ["seen"])
    with pytest.raises(ValueError, match=r"float32.*uint8.*in_env_units = True"):
        made(spec, "seen", decoder)
    parts = TensorDictSequential(decoder)
    with pytest.raises(ValueError, match=r"float32.*uint8.*in_env_units = True"):
        made(spec, "seen", parts)
    for one in (decoder, parts):
        one.in_env_units = True
        env = made(spec, "seen", one)
        latent = env.reset()
        expected = decoder.module(latent["latent"]).round().clamp(0, 255)
        assert torch.equal(latent["seen"], expected.to(torch.uint8))
    with pytest.raises(ValueError, match=r"feature shape \(4,\)"):
        made(spec, "seen", Mod(Shown([0.0] * 4, (4,)), ["latent"], ["seen"]))


def test_floats_are_shown_where_the_caller_says_so() -> None:
    spec, decoded, _ = CASES["bytes"]
    shown = Shown(decoded)
    env = made(
        spec,
        "seen",
        Mod(shown, ["latent"], ["seen"]),
        observation_spec=Composite(seen=Unbounded((5,))),
    )
    out = env.imagine(2)["next", "seen"]
    assert torch.equal(out[0, 0], torch.tensor(decoded))
    out.sum().backward()
    assert torch.equal(shown.values.grad, torch.full((5,), 8.0))


def test_a_decoder_that_is_replaced() -> None:
    spec, decoded, shown = CASES["counts"]
    env = made(spec, "seen", Mod(Shown([0.0] * 5), ["latent"], ["seen"]))
    env.imagine(1)
    env.world_model.decoder = Mod(Shown(decoded), ["latent"], ["seen"])
    assert env.imagine(1)["next", "seen"][0, 0].tolist() == shown
    env.world_model.decoder.module = Shown([5.4] * 5)
    assert env.imagine(1)["next", "seen"][0, 0].tolist() == [5] * 5
    env.world_model.decoder.module = nn.Linear(3, 5)
    with pytest.raises(ValueError, match="predicts.*seen.*float32.*int32"):
        env.imagine(1)
    env.world_model.decoder = Mod(nn.Linear(3, 5), ["latent"], ["seen"])
    with pytest.raises(ValueError, match="decoder writes 'seen'.*float32"):
        env.imagine(1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_found_before_it_is_rounded(bad) -> None:
    spec = CASES["bytes"][0]
    decoder = Mod(Shown([1.0, 2.0, bad, 3.0, 4.0]), ["latent"], ["seen"])
    env = made(spec, "seen", decoder, check_finite=True)
    with pytest.raises(FloatingPointError, match="next.*seen"):
        env.imagine(2)
