"""Envs of float64, and models of it."""

from __future__ import annotations

import pytest
import torch
from _env_kinds import drawn_transitions
from _models import SpecEnv
from _small_models import MAKE
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs.utils import check_env_specs

from torchrl_wm import WorldModelEnv
from torchrl_wm.models import (
    load_world_model,
    make_ensemble_world_model,
    save_world_model,
)
from torchrl_wm.modules import fit_normalizers

NAMES = (
    "diffusion",
    "ensemble",
    "jepa",
    "mlp",
    "planet",
    "dreamer-v3",
    "tdmpc2",
    "transformer",
)
NESTED = {
    "observation_key": ("robot", "seen"),
    "action_key": ("robot", "push"),
    "reward_key": ("robot", "gain"),
}


def double_env(nested: bool) -> SpecEnv:
    """All numbers are float64, as MuJoCo's are."""
    keys = NESTED if nested else {}
    env = SpecEnv(action_spec=Bounded(-1, 1, (2,), dtype=torch.float64), **keys)
    for name, key, size in (("observation", "observation", 6), ("reward", "reward", 1)):
        spec = Composite(shape=())
        spec[keys.get(f"{name}_key", key)] = Unbounded((size,), dtype=torch.float64)
        setattr(env, f"{name}_spec", spec)
    return env


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_envs_of_float64(name, nested) -> None:
    env = double_env(nested)
    world_model, loss = MAKE[name](env)
    batch = drawn_transitions(env, 4, 3)
    fit_normalizers(world_model, batch)
    losses = loss(batch)
    assert all(value.isfinite() for value in losses.values())
    losses.sum(reduce=True).backward()
    starts = batch[:, 0].select(*world_model.encoder.in_keys)
    imagined = WorldModelEnv(world_model, env, start_states=starts)
    check_env_specs(imagined)
    reward = imagined.imagine(2)["next"].get(
        NESTED["reward_key"] if nested else "reward"
    )
    assert reward.dtype is torch.float64


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_models_of_float64(name, nested, tmp_path) -> None:
    env = SpecEnv(**(NESTED if nested else {}))
    world_model, _ = MAKE[name](env)
    batch = drawn_transitions(env, 4, 3)
    fit_normalizers(world_model, batch)
    world_model.double()
    save_world_model(world_model, tmp_path / "model.pt")
    starts = batch[:, 0].select(*world_model.encoder.in_keys)
    for model in (world_model, load_world_model(tmp_path / "model.pt")):
        imagined = WorldModelEnv(model, env, start_states=starts)
        out = imagined.imagine(2)
        assert all(v.isfinite().all() for v in out.values(True, True))
        assert all(p.dtype is torch.float64 for p in model.parameters())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_models_of_large_numbers_come_back(name, nested, tmp_path) -> None:
    """Made anew from a file, a model of a float64 env keeps apart what float32 cannot."""
    env, key = double_env(nested), ("robot", "seen") if nested else "observation"
    world_model, _ = MAKE[name](env)
    batch = drawn_transitions(env, 4, 10)
    now = 1e8 + 0.01 * torch.arange(10, dtype=torch.float64).reshape(1, 10, 1)
    batch.set(key, now.expand(4, 10, 6).clone())
    batch["next"].set(key, batch.get(key) + 0.01)
    fit_normalizers(world_model, batch)
    save_world_model(world_model, tmp_path / "model.pt")
    outs = []
    for model in (world_model, load_world_model(tmp_path / "model.pt")):
        torch.manual_seed(0)
        outs.append(model(batch.exclude("next").clone())["next"])
    assert set(outs[0].keys(True, True)) == set(outs[1].keys(True, True))
    for entry in outs[0].keys(True, True):
        assert torch.equal(outs[0].get(entry), outs[1].get(entry)), entry
        assert outs[0].get(entry).dtype is outs[1].get(entry).dtype, entry
    if name == "ensemble":  # the others' latents are of no float64
        change = outs[1].get(key) - batch.get(key)
        assert torch.allclose(change, torch.tensor(0.01, dtype=change.dtype), atol=1e-3)


@pytest.mark.parametrize("nested", [False, True])
def test_planet_in_float64_is_planet_and_trains(nested) -> None:
    """TorchRL's own prior cannot be of float64; what ours computes is what it computes."""
    keys = NESTED if nested else {}
    env = double_env(nested)
    world_model, loss = MAKE["planet"](env)
    batch = drawn_transitions(env, 4, 3)
    single = [v.float() for v in (torch.randn(4, 30), torch.randn(4, 16))]
    action = batch.get(keys.get("action_key", "action"))[:, 0]
    dynamics = world_model.dynamics.module
    torch.manual_seed(0)
    expected = dynamics.prior(*single, action.float())
    loss.double(), world_model.double()
    torch.manual_seed(0)
    out = dynamics(*(v.double() for v in single), action)
    assert all(v.dtype is torch.float64 for v in out)
    for value, other in zip(out[:2], expected[:2]):  # the noise is of another dtype
        assert torch.allclose(value.float(), other, atol=1e-5)
    assert torch.allclose(out[3].float(), expected[3], atol=1e-5)
    assert ((out[2] - out[0]) / out[1]).abs().max() < 6  # drawn from them
    losses = loss(batch)
    losses.sum(reduce=True).backward()
    assert all(p.grad.isfinite().all() for p in dynamics.parameters())


@pytest.mark.parametrize("nested", [False, True])
def test_small_changes_of_large_numbers_are_kept(nested) -> None:
    """At 4e6 neighbouring floats of 32 bits are 0.25 apart."""
    env, key = double_env(nested), ("robot", "seen") if nested else "observation"
    world_model, loss = make_ensemble_world_model(env, members=2, hidden=(8,))
    batch = drawn_transitions(env, 50, 10)
    now = 4e6 + torch.randn(50, 10, 6, dtype=torch.float64)
    batch.set(key, now)
    batch["next"].set(key, now + 0.01 + 0.001 * torch.randn_like(now))
    fit_normalizers(world_model, batch)
    out = world_model(batch.exclude("next"))["next"].get(key)
    assert out.dtype is torch.float64
    change = (out - now).mean()
    assert change.item() == pytest.approx(0.01, abs=0.005)
    # Of Gaussians of this spread; errors of 0.25 would be 250 times as large.
    assert loss(batch)["loss_nll"] < 10
    assert world_model.dynamics.member_errors(batch).max() < 10
