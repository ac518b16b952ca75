"""TD-MPC2's model, made from an env's specs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _built import CASES, DotEnv, made_env, relative_error, sequences, train
from _models import SpecEnv
from tensordict.nn import TensorDictModule as Mod
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import GymEnv
from torchrl.envs.utils import check_env_specs
from torchrl.modules import MLP
from torchrl.objectives import SoftUpdate

from torchrl_wm import WorldModelEnv, WorldModelLoss
from torchrl_wm.models import (
    load_world_model,
    make_tdmpc2_q_ensemble,
    make_tdmpc2_world_model,
    save_world_model,
    TDMPC2Config,
)
from torchrl_wm.objectives import ValueTerm

SMALL = {
    "latent_size": 16,
    "group": 4,
    "num_cells": 12,
    "encoder_cells": 10,
    "pixel_depth": 2,
}


@pytest.mark.parametrize("observations, action", CASES)
class TestSpecs:
    def test_env(self, observations, action) -> None:
        env = made_env(observations, action)
        world_model, _ = make_tdmpc2_world_model(env, **SMALL)
        starts = sequences(env, 9).exclude("next", "action")
        for size in ([], [2]):
            check_env_specs(
                WorldModelEnv(world_model, env, start_states=starts, batch_size=size)
            )
        out = WorldModelEnv(world_model, env).imagine(3, tensordict=starts)
        assert (out["next", "latent"] != out["latent"]).any(-1).all()
        groups = out["next", "latent"].unflatten(-1, (-1, 4))
        torch.testing.assert_close(groups.sum(-1), torch.ones(9, 3, 4))

    def test_loss(self, observations, action) -> None:
        env = made_env(observations, action)
        world_model, loss = make_tdmpc2_world_model(env, **SMALL)
        losses = loss(sequences(env, 2, 3))
        assert all(value.isfinite() for value in losses.values())
        losses.sum(reduce=True).backward()
        for name in world_model.components:
            params = getattr(loss, name + "_params").values(True, True)
            grads = [p.grad for p in params if p.requires_grad]
            assert any(g is not None and g.any() for g in grads), name


def test_class_numbers_are_encoded() -> None:
    """There is no decoder that could not tell them apart."""
    env = made_env()
    env.observation_spec = Composite(cell=Categorical(5), x=Unbounded((2,)))
    world_model, loss = make_tdmpc2_world_model(env, **SMALL)
    assert loss(sequences(env, 2, 3))["loss_consistency"].isfinite()
    check_env_specs(
        WorldModelEnv(world_model, env, start_states=sequences(env, 4).exclude("next"))
    )


def test_nested_keys() -> None:
    env = SpecEnv(
        observation_key=("robot", "seen"),
        action_key=("robot", "push"),
        reward_key=("robot", "gain"),
    )
    world_model, loss = make_tdmpc2_world_model(env, **SMALL)
    assert world_model.reward_head.out_keys == [
        ("next", "robot", "gain_logits"),
        ("next", "robot", "gain"),
    ]
    data = sequences(env, 2, 3)
    q = make_tdmpc2_q_ensemble(env, **SMALL)
    policy = Mod(MLP(16, 2, num_cells=[4]), ["latent"], [("robot", "push")])
    loss = WorldModelLoss(
        world_model, losses=[*loss.terms, ValueTerm(q, policy)], multi_step=True
    )
    loss.set_keys(reward=("robot", "gain"))
    SoftUpdate(loss, tau=0.1)
    assert all(value.isfinite() for value in loss(data).values())
    starts = data[:, 0].select(("robot", "seen"))
    check_env_specs(WorldModelEnv(world_model, env, start_states=starts))


def test_loss_is_the_paper_s() -> None:
    """Equation 3 of arXiv 2310.16828, written out; values included."""
    env = made_env()
    config = TDMPC2Config(**SMALL, q_dropout=0.0)
    world_model, loss = make_tdmpc2_world_model(env, config)
    q = make_tdmpc2_q_ensemble(env, config)
    policy = Mod(MLP(16, 2, num_cells=[4]), ["latent"], ["action"])
    loss = WorldModelLoss(
        world_model,
        losses=[*loss.terms, ValueTerm(q, policy, gamma=0.9, subset=None)],
        multi_step=True,
        decay=0.5,
    )
    SoftUpdate(loss, tau=0.5)
    # Heads and values that say something, and targets that differ from the values.
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in [*world_model.reward_head.parameters(), *q.parameters()]:
            parameter.add_(0.05 * torch.randn_like(parameter))
        for target in loss.target_q_ensemble_params.values(True, True):
            if target.is_floating_point() and target.shape != q.two_hot.bins.shape:
                target.add_(0.05 * torch.randn_like(target))
    data = sequences(env, 3, 4)
    data["next", "terminated"][1, -1] = data["next", "done"][1, -1] = True
    out = loss(data)

    def symlog(x):
        return x.sign() * (x.abs() + 1).log()

    bins = torch.linspace(-10, 10, 101)

    def cross_entropy(logits, x):
        """Between the two bins around symlog(x), each by its nearness."""
        place = (symlog(x) + 10) / 0.2
        low = place.floor().long().clamp(0, 99)
        high = (place - low).clamp(0, 1)
        log_probs = logits.log_softmax(-1)
        below = log_probs.gather(-1, low.unsqueeze(-1)).squeeze(-1)
        above = log_probs.gather(-1, low.unsqueeze(-1) + 1).squeeze(-1)
        return -((1 - high) * below + high * above)

    def decode(logits):
        x = (logits.softmax(-1) * bins).sum(-1)
        return x.sign() * (x.abs().exp() - 1)

    encode, step = world_model.encoder.module, world_model.dynamics.module
    names = ("consistency", "reward", "done", "value")
    totals = dict.fromkeys(names, 0.0)
    latent = encode(data["observation"][:, 0])
    for t in range(4):
        now = data[:, t]
        ahead = step(latent, now["action"])
        target = encode(now["next", "observation"]).detach()
        reward = now["next", "reward"].squeeze(-1)
        terminated = now["next", "terminated"].float()
        logits, _ = world_model.reward_head.module(latent, now["action"])
        with loss.target_parameters("q_ensemble"):
            best = decode(q.logits([target], [policy.module(target)])).amin(-1)
        returns = reward + 0.9 * (1 - terminated.squeeze(-1)) * best
        values = q.logits([latent], [now["action"]])
        errors = {
            "consistency": 20 * (ahead - target).pow(2).mean(-1),
            "reward": 0.1 * cross_entropy(logits, reward),
            "done": F.binary_cross_entropy_with_logits(
                world_model.done_head.module(ahead)[0], terminated, reduction="none"
            ).squeeze(-1),
            "value": 0.1
            * cross_entropy(values, returns.unsqueeze(-1).expand(3, 5)).mean(-1),
        }
        for name in names:
            totals[name] = totals[name] + 0.5**t * errors[name].mean() / 4
        latent = ahead
    for name in names:
        torch.testing.assert_close(out[f"loss_{name}"], totals[name])


class TestConfig:
    def test_bad_settings(self) -> None:
        with pytest.raises(ValueError, match="group=8 does not divide latent_size=20"):
            make_tdmpc2_world_model(made_env(), latent_size=20)
        with pytest.raises(ValueError, match="encoder_depth=0 must be at least 1"):
            TDMPC2Config(encoder_depth=0)
        for name, least in (
            ("group", 2),
            ("latent_size", 1),
            ("num_cells", 1),
            ("depth", 0),
            ("encoder_cells", 1),
            ("pixel_depth", 1),
            ("num_q", 1),
        ):
            with pytest.raises(
                ValueError, match=f"{name}={least - 1} must be at least {least}"
            ):
                TDMPC2Config(**{name: least - 1})
        for share in (-0.1, 1.0):
            with pytest.raises(ValueError, match=f"q_dropout={share} must be"):
                TDMPC2Config(q_dropout=share)
        with pytest.raises(TypeError, match="config must be a TDMPC2Config, got dict"):
            make_tdmpc2_world_model(made_env(), {"latent_size": 8})

    def test_settings_take_effect(self) -> None:
        world_model, loss = make_tdmpc2_world_model(
            made_env(), TDMPC2Config(**SMALL), bins=11, done_head=False, decay=0.9
        )
        data = sequences(made_env(), 2, 3)
        assert world_model(data)["next", "reward_logits"].shape == (2, 3, 11)
        assert loss.losses == ["consistency", "reward"] and loss.decay == 0.9
        assert world_model.done_head is None

    def test_least_settings_work(self) -> None:
        names = ("num_cells", "encoder_cells", "pixel_depth", "num_q")
        least = {"group": 2, "depth": 0, **dict.fromkeys(names, 1)}
        config = TDMPC2Config(**{**SMALL, **least}, q_dropout=0.0)
        env = made_env("pixels and vector")
        world_model, loss = make_tdmpc2_world_model(env, config)
        data = sequences(env, 2, 3)
        assert all(value.isfinite() for value in loss(data).values())
        out = make_tdmpc2_q_ensemble(env, config)(world_model(data))
        assert out["state_action_value_logits"].shape == (2, 3, 1, 101)

    def test_first_reward_is_zero(self) -> None:
        world_model, _ = make_tdmpc2_world_model(made_env(), **SMALL)
        out = world_model(sequences(made_env(), 4))
        assert not out["next", "reward"].any()


def test_file(tmp_path) -> None:
    """From a file alone, the same model."""
    env = made_env("pixels and vector")
    world_model, _ = make_tdmpc2_world_model(env, TDMPC2Config(**SMALL))
    save_world_model(world_model, tmp_path / "model.pt")
    again = load_world_model(tmp_path / "model.pt")
    data = sequences(env, 4)
    torch.manual_seed(0)
    expected = world_model(data.clone())["next"]
    torch.manual_seed(0)
    out = again(data.clone())["next"]
    for key in ("reward", "terminated", *world_model.latent_keys):
        assert torch.equal(out[key], expected[key]), key


def test_compiles() -> None:
    world_model, _ = make_tdmpc2_world_model(made_env(), **SMALL)
    env = WorldModelEnv(world_model, made_env())
    starts = sequences(made_env(), 4).select("observation")
    starts = world_model.encode(starts).select("latent").detach()
    actions = sequences(made_env(), 4, 3).select("action")
    expected = env.imagine(3, tensordict=starts, actions=actions)
    env.compile(backend="eager", fullgraph=True)
    out = env.imagine(3, tensordict=starts, actions=actions)
    for key in ("latent", "reward", "terminated"):
        torch.testing.assert_close(out["next", key], expected["next", key])


# Real data -----------------------------------------------------------------


def learned(real, steps: int, episodes: int = 30, length: int = 60):
    real.set_seed(0)
    data = [real.rollout(length) for _ in range(episodes)]
    world_model, loss = make_tdmpc2_world_model(
        real, latent_size=32, num_cells=48, encoder_cells=48, pixel_depth=8
    )
    history = train(loss, data, steps=steps, rows=32, length=4, lr=1e-3)
    held_out = [real.rollout(length) for _ in range(10)]
    env = WorldModelEnv(world_model, real, batch_size=[])
    return history, relative_error(env, held_out, 6)["latent"], env, held_out


def check_latents(env, episodes, spread: float) -> None:
    """They have not collapsed, which would make them easy to predict."""
    with torch.no_grad():
        latents = env.world_model.encode(episodes.clone())["latent"]
    assert latents.std(0).mean() > spread


@pytest.mark.parametrize("name", ["Pendulum-v1", "CartPole-v1", "pixels"])
def test_learns(name) -> None:
    """After a moment, on other episodes and open loop."""
    real = DotEnv() if name == "pixels" else GymEnv(name)
    history, error, env, held_out = learned(real, steps=200)
    assert history[-1] < 0.4 * history[0]
    assert error[-1] < 0.9, error
    check_latents(env, torch.cat(held_out), 3e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Pendulum-v1", "pixels"])
def test_learns_well(name) -> None:
    real = DotEnv() if name == "pixels" else GymEnv(name)
    _, error, env, held_out = learned(real, steps=1500)
    episodes = torch.cat(held_out)
    check_latents(env, episodes, 1e-2)
    with torch.no_grad():
        reward = env.world_model(episodes.clone())["next", "reward"]
    real_reward = episodes["next", "reward"]
    assert (error < 0.7).all(), error
    assert (reward - real_reward).std() < 0.3 * real_reward.std()
