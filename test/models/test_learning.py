"""The models learn: from real data, to predict it, and to know what they do not know."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _env_kinds import Dot, episodes, real_env, trained
from _models import SpecEnv
from tensordict import TensorDict
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import GymWrapper
from torchrl.envs.utils import check_env_specs

from torchrl_wm import WorldModelEnv
from torchrl_wm.diagnostics import open_loop_error
from torchrl_wm.models import make_ensemble_world_model, make_mlp_world_model
from torchrl_wm.modules import fit_normalizers, with_propagation

HORIZON = 5


def ensemble_of(env):
    return make_ensemble_world_model(
        env, members=3, elites=2, hidden=(64, 64), termination_hidden=(32,)
    )


def mlp_of(env):
    return make_mlp_world_model(env, hidden=(64, 64), latent_size=16, pixel_depth=4)


def beats_persistence(make, name: str, *, rows: int, seed: int, **training) -> dict:
    """Train on some episodes; the ratio of errors to persistence's on others, ``[H]`` by key."""
    env = real_env(name)
    data = episodes(name, rows, 50, seed)
    held_out = episodes(name, max(rows // 4, 2), 50, seed + 100)
    torch.manual_seed(seed)
    world_model, loss = make(env)
    fit_normalizers(world_model, data)
    trained(loss, data.reshape(-1), **training)
    if make is ensemble_of:
        world_model.dynamics.choose_elites(held_out.reshape(-1))
        world_model = with_propagation(world_model, "mean")
    # Images of bytes are decoded as floats.
    views = Composite(view=Unbounded((16, 16, 1))) if name == "dot" else None
    decode = make is mlp_of
    imagined = WorldModelEnv(world_model, env, decode=decode, observation_spec=views)
    error = open_loop_error(imagined, held_out, HORIZON)
    return {
        key: error["model", key].flatten(1).norm(dim=1)
        / error["persistence", key].flatten(1).norm(dim=1)
        for key in error["persistence"].keys()
    }


@pytest.mark.parametrize("name", ["Pendulum-v1", "CartPole-v1"])
@pytest.mark.parametrize("make", [ensemble_of, mlp_of])
def test_it_beats_persistence_at_every_step(make, name) -> None:
    ratios = beats_persistence(make, name, rows=20, steps=250, seed=0)
    assert list(ratios) == ["observation"]
    assert (ratios["observation"] < 0.9).all(), ratios


def test_it_beats_persistence_in_images() -> None:
    ratios = beats_persistence(
        mlp_of, "dot", rows=20, seed=0, steps=200, batch=32, lr=6e-3
    )
    assert (ratios["view"] < 0.9).all(), ratios


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    "make, name",
    [
        (make, name)
        for make in (ensemble_of, mlp_of)
        for name in ("Pendulum-v1", "CartPole-v1")
    ]
    + [(mlp_of, "dot")],
)
def test_it_does_so_for_every_seed(make, name, seed) -> None:
    ratios = beats_persistence(make, name, rows=40, steps=1500, seed=seed)
    for ratio in ratios.values():
        assert (ratio < 0.6).all(), ratios


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("channels_first", [False, True])
def test_images_of_every_kind(dtype, channels_first) -> None:
    env = GymWrapper(Dot(dtype=dtype, channels_first=channels_first))
    world_model, loss = mlp_of(env)
    data = env.rollout(8)
    fit_normalizers(world_model, data)
    values = loss(data)
    assert all(value.isfinite() for value in values.values())
    check_env_specs(WorldModelEnv(world_model, env, start_states=env))
    with pytest.raises(
        ValueError, match="make_ensemble_world_model cannot serve .*'view'"
    ):
        make_ensemble_world_model(env)


# Calibration ---------------------------------------------------------------


def noisy_transitions(n: int, *, far: bool = False) -> TensorDict:
    """``x' = sin(2 x) + a / 2`` with noise that grows with ``x``; ``x`` in [-2, 2], or far from it."""
    x, a = torch.rand(n, 1) * 4 - 2, torch.rand(n, 1) * 2 - 1
    if far:
        x = x.sign() * (6 + x.abs())
    std = 0.05 + 0.3 * torch.sigmoid(3 * x)
    noise = std * torch.randn(n, 1)
    following = {"observation": torch.sin(2 * x) + a / 2 + noise}
    return TensorDict({"observation": x, "action": a, "next": following}, [n])


def calibration(seed: int, steps: int) -> tuple[float, float, float]:
    """Coverage of 90% intervals, rank correlation of spreads, and far disagreement over near."""
    torch.manual_seed(seed)
    data, held_out = noisy_transitions(4000), noisy_transitions(4000)
    world_model, loss = make_ensemble_world_model(
        SpecEnv(observation=1, action_spec=Bounded(-1.0, 1.0, (1,))),
        members=5,
        hidden=(64, 64),
        target="absolute",
        propagation="mean",
        termination="none",
        reward_function=lambda observation, action, following: following[..., 0],
    )
    fit_normalizers(world_model, data)
    optimizer = torch.optim.Adam(loss.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss(data[torch.randint(4000, (256,))]).sum(reduce=True).backward()
        optimizer.step(), optimizer.zero_grad(), schedule.step()
    with torch.no_grad():
        near = world_model.dynamics(held_out.exclude("next"))["next"]
        far = world_model.dynamics(noisy_transitions(1000, far=True))["next"]
    mean = near["loc"].mean(1)
    # The members' mixture: noise that each sees, and what they disagree about.
    std = (near["log_var"].exp().mean(1) + near["loc"].var(1, unbiased=False)).sqrt()
    real = held_out["next", "observation"]
    covered = ((real - mean).abs() <= 1.6449 * std).float().mean()
    known = 0.05 + 0.3 * torch.sigmoid(3 * held_out["observation"])
    likeness = torch.corrcoef(torch.cat([std, known], -1).T)[0, 1]
    ratio = far["disagreement"].mean() / near["disagreement"].mean()
    return covered.item(), likeness.item(), ratio.item()


def check_calibration(seed: int, steps: int) -> None:
    covered, likeness, ratio = calibration(seed, steps)
    assert 0.87 <= covered <= 0.93
    assert likeness > 0.95, "the predicted spread is not that of the noise"
    assert ratio >= 5


def test_it_knows_what_it_does_not_know() -> None:
    check_calibration(seed=0, steps=400)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_it_knows_so_for_every_seed(seed) -> None:
    check_calibration(seed, steps=1000)
