"""Training in TorchRL's Trainer, and the hook that imagines beside it."""

from __future__ import annotations

import pytest
import torch
from _models import (
    ACTION,
    clock_env,
    clock_model,
    ends_at,
    make_model,
    OBS,
    observations,
    SpecEnv,
    times,
)
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer
from torchrl.envs import GymEnv
from torchrl.modules import MLP
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import ReplayBufferTrainer

from torchrl_wm import WorldModel, WorldModelEnv, WorldModelLoss
from torchrl_wm.trainers import ImaginedReplayHook


def buffer(size: int = 10_000) -> ReplayBuffer:
    return TensorDictReplayBuffer(storage=LazyTensorStorage(size), batch_size=64)


def test_trainer_loop_on_a_real_env() -> None:
    """The model learns, and the imagined buffer holds what it imagines from real states."""
    env = GymEnv("Pendulum-v1")
    env.set_seed(0)
    inputs = ["observation", "action"]
    model = WorldModel(
        Mod(nn.Identity(), ["observation"], ["observation"]),
        Mod(MLP(4, 3, num_cells=[64]), inputs, [("next", "observation")]),
        Mod(MLP(4, 1, num_cells=[64]), inputs, [("next", "reward")]),
    )
    loss = WorldModelLoss(model, losses=["latent", "reward"])
    held_out = env.rollout(200)
    before = loss(held_out)["loss_latent"].item()
    real, imagined = buffer(), buffer()
    trainer = Trainer(
        collector=Collector(env, None, frames_per_batch=100, total_frames=600),
        total_frames=600,
        frame_skip=1,
        optim_steps_per_batch=50,
        loss_module=loss,
        optimizer=torch.optim.Adam(loss.parameters(), lr=1e-3),
        progress_bar=False,
    )
    ReplayBufferTrainer(real, flatten_tensordicts=True).register(trainer)
    hook = ImaginedReplayHook(
        WorldModelEnv(model, env), imagined, real, horizon=2, num_starts=30, interval=2
    )
    hook.register(trainer)
    trainer.train()
    assert len(real) == 600
    assert len(imagined) == hook.imagined_frames == 3 * 30 * 2
    assert loss(held_out)["loss_latent"].item() < 0.2 * before
    # Rollouts branch off from real states, and the buffers share their keys.
    assert imagined.sample()["next", "observation"].shape == (64, 3)
    states = real[:]["observation"]
    starts = imagined[:]["observation"]
    exact = (starts.unsqueeze(1) == states).all(-1).any(-1)
    assert exact.sum() >= 90


def test_what_follows_an_end_is_left_out() -> None:
    target = buffer()
    hook = ImaginedReplayHook(
        WorldModelEnv(clock_model(done=ends_at(2)), clock_env()),
        target,
        times(0.0),
        horizon=5,
        num_starts=10,
    )
    hook()
    assert len(target) == hook.imagined_frames == 20
    assert target[:]["next", "latent"].max() == 2
    assert "collector" not in target[:].keys()


def test_policy_explores_and_the_model_keeps_its_mode() -> None:
    model = make_model()
    model.encoder = Mod(
        nn.Sequential(nn.Dropout(0.5), nn.Linear(OBS, 4)), ["observation"], ["latent"]
    )
    model.train()
    modes = []

    def policy(tensordict):
        modes.append(model.training)
        return tensordict.set("action", torch.ones(*tensordict.batch_size, ACTION))

    target = buffer()
    ImaginedReplayHook(
        WorldModelEnv(model, SpecEnv()), target, observations(5), policy=policy
    )()
    assert modes == [False] and model.training
    assert (target[:]["action"] == 1).all()
    assert not target[:]["latent"].requires_grad


def test_state_dict_round_trip() -> None:
    def hook() -> ImaginedReplayHook:
        env = WorldModelEnv(make_model(), SpecEnv())
        return ImaginedReplayHook(env, buffer(), observations(5), num_starts=7)

    one, two = hook(), hook()
    one()
    two.load_state_dict(one.state_dict())
    assert two.imagined_frames == len(two.replay_buffer) == 7
    assert torch.equal(two.replay_buffer[:]["latent"], one.replay_buffer[:]["latent"])


def test_nothing_of_the_real_sample_but_its_state_is_kept() -> None:
    starts = observations(5).set("sample_log_prob", torch.ones(5))
    target = buffer()
    env = WorldModelEnv(make_model(), SpecEnv())
    ImaginedReplayHook(env, target, starts, num_starts=3)()
    assert "sample_log_prob" not in target[:].keys()


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="got TensorDictReplayBuffer and WorldModelEnv"):
        env = WorldModelEnv(make_model(), SpecEnv())
        ImaginedReplayHook(buffer(), env, observations(5))
    env = WorldModelEnv(make_model(), SpecEnv(), batch_size=4)
    with pytest.raises(ValueError, match=r"num_starts=5.*\(4,\).*batch_size=\[\]"):
        ImaginedReplayHook(env, buffer(), observations(5), num_starts=5)
    for name in ("horizon", "num_starts", "interval"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            ImaginedReplayHook(env, buffer(), observations(5), **{name: 0})
