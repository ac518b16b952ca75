"""Fans: of known spread, around the truth, for any batch dims and keys."""

from __future__ import annotations

import pytest
import torch
from _diagnosed import line, observed_clock, padded, walk, walk_env
from _models import ends_at
from tensordict.nn import TensorDictModule as Mod

from torchrl_wm.diagnostics import prediction_fan


@pytest.mark.parametrize("key", ["observation", ("agents", "position")])
def test_the_spread_is_that_of_the_model(key) -> None:
    env = walk_env(sample=True, scale=0.5, key=key)
    fan = prediction_fan(
        env, walk(30, key=key), 4, start=7, particles=4000, quantiles=(0.9, 0.5, 0.1)
    )
    assert fan.batch_size == (4,)
    k = torch.arange(1.0, 5).unsqueeze(-1)
    samples = fan.get("samples").get(key)
    assert samples.shape == (4, 4000, 2)
    torch.testing.assert_close(
        samples.std(1), 0.5 * k.sqrt().expand(4, 2), rtol=0.06, atol=0.0
    )
    low, _, high = fan.get("quantiles").get(key).unbind(1)  # levels are sorted
    torch.testing.assert_close(
        high - low, 2 * 1.2816 * samples.std(1), rtol=0.08, atol=0.0
    )
    assert fan["level"][0].tolist() == pytest.approx([0.1, 0.5, 0.9])
    torch.testing.assert_close(fan.get("mean").get(key), samples.mean(1))


def test_a_perfect_model_is_on_the_truth() -> None:
    episodes = walk(2, 3, 10, noise=0.0)
    fan = prediction_fan(walk_env(), episodes, 5, start=2, particles=3)
    assert fan.batch_size == (2, 3, 5)
    torch.testing.assert_close(
        fan["real", "observation"], episodes["next", "observation"][..., 2:7, :]
    )
    torch.testing.assert_close(fan["mean", "observation"], fan["real", "observation"])
    torch.testing.assert_close(fan["mean", "reward"], fan["real", "reward"])
    assert fan["samples", "reward"].shape == (2, 3, 5, 3, 1)


def test_what_comes_after_an_end_is_marked() -> None:
    fan = prediction_fan(observed_clock(), line(10, 1.0, ends=(3,)), 6, particles=2)
    assert fan["collector", "mask"].tolist() == [True] * 4 + [False] * 2
    later = padded(line(5, 1.0), 5)
    mask = prediction_fan(observed_clock(), later, 7, particles=2)["collector", "mask"]
    assert mask.tolist() == [True] * 5 + [False] * 2
    with pytest.raises(ValueError, match="Step 6 of the episodes .* is padding"):
        prediction_fan(observed_clock(), later, 2, start=6)


def test_particles_that_have_ended() -> None:
    head = Mod(
        lambda x: x[..., :1] >= 3, [("next", "observation")], [("next", "terminated")]
    )
    episodes = line(8, 1.0).select("observation", "action", "next")
    env = observed_clock()
    env.world_model.done_head = head
    env = type(env)(env.world_model, env)
    fan = prediction_fan(env, episodes, 6, particles=2)
    assert fan["alive"].flatten().tolist() == [1, 1, 1, 0, 0, 0]
    assert ends_at(3).out_keys == head.out_keys


def test_chosen_keys() -> None:
    fan = prediction_fan(walk_env(), walk(10), 3, particles=2, keys=["reward"])
    assert list(fan["real"].keys()) == ["reward"]
    with pytest.raises(KeyError, match=r"\['pixels'\] are not among.*observation"):
        prediction_fan(walk_env(), walk(10), 3, keys=["pixels"])


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"particles": 0}, "particles must be a positive int"),
        ({"quantiles": (0.5, 1.5)}, "levels between 0 and 1"),
        ({"quantiles": ()}, "levels between 0 and 1"),
        ({"start": 8}, "from start=8 on do not fit"),
        ({"start": -1}, "do not fit"),
    ],
)
def test_bad_arguments(kwargs, match) -> None:
    with pytest.raises(ValueError, match=match):
        prediction_fan(walk_env(), walk(10), 3, **kwargs)
