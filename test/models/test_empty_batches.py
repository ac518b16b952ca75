"""Batches of no rows: what is left when every episode of a batch has ended."""

from __future__ import annotations

import pytest
from _built import CASES, made_env, sequences
from _env_kinds import env_of
from _small_models import MAKE

from torchrl_wm import WorldModelEnv
from torchrl_wm.modules import with_propagation
from torchrl_wm.modules.blocks.ensemble_dynamics import PROPAGATIONS

#: What keeps the networks of each small, of images and of terminations.
SETTINGS = {
    "diffusion": {},
    "ensemble": {"termination_members": 2},
    "mlp": {"pixel_depth": 2},
    "planet": {"pixel_depth": 2},
    "dreamer-v3": {"pixel_depth": 2},
    "jepa": {"pixel_depth": 2},
    "tdmpc2": {"pixel_depth": 2},
}
#: What members predict: the observations themselves.
FLOATS = ("vector", "float64", "dictionary")


def check(world_model, env) -> None:
    """Imagination from no rows has the entries of one from two, none of them."""
    starts = sequences(env, 2).select(*world_model.encoder.in_keys)
    for size, rows in (((0,), starts[:0]), ((2, 0), starts.unsqueeze(-1)[:, :0])):
        imagined = WorldModelEnv(world_model, env)
        full, none = (imagined.imagine(3, tensordict=td) for td in (starts, rows))
        assert none.shape == (*size, 3)
        for key in full.keys(True, True):
            value, other = full.get(key), none.get(key)
            assert other.shape == (*size, 3, *value.shape[2:]), key
            assert other.dtype is value.dtype, key


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("observations, action", CASES)
def test_every_kind_of_env(name, observations, action) -> None:
    if name == "ensemble" and observations not in FLOATS:
        pytest.skip(f"no ensemble serves {observations}")
    if name == "diffusion" and observations == "pixels and vector":
        pytest.skip("frames are vectors or images")
    env = made_env(observations, action)
    check(MAKE[name](env, **SETTINGS[name])[0], env)


@pytest.mark.parametrize("name", SETTINGS)
def test_nested_keys(name) -> None:
    env = env_of("dictionary", "multi-categorical", nested=True)
    check(MAKE[name](env, **SETTINGS[name])[0], env)


@pytest.mark.parametrize("all_members", [False, True])
@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_every_propagation(propagation, all_members) -> None:
    env = made_env("dictionary", "categorical")
    world_model, _ = MAKE["ensemble"](env, **SETTINGS["ensemble"])
    check(with_propagation(world_model, propagation, all_members=all_members), env)
