"""Devices: models and policies there, real envs on the CPU, and nothing that waits in between."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from _runs import interrupt, MBPO, PETS, RECIPES
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictParams, TensorDictSequential
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.modules import EGreedyModule, MLP, QValueActor

from torchrl_wm.trainers import (
    make_real_env,
    MBPOTrainer,
    PETSTrainer,
    RunConfig,
    TDMPC2Trainer,
)
from torchrl_wm.trainers.acting import Acting
from torchrl_wm.trainers.collecting import RealSteps
from torchrl_wm.trainers.episodes import Episodes
from torchrl_wm.trainers.evaluation import forked_random
from torchrl_wm.trainers.imagined_replay import sample_newest
from torchrl_wm.trainers.learning import check_losses, NonFiniteLossError
from torchrl_wm.trainers.recipe import make_replay


class Waits(TorchDispatchMode):
    """Counts what waits for a device: a number that is read from it, a shape that depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        self.count += func.overloadpacket in waits
        return func(*args, **(kwargs or {}))


def trained(kind, **settings):
    trainer = kind(**settings)
    trainer.train()
    return trainer


# What waits ----------------------------------------------------------------


def test_losses_on_a_device_are_looked_at_now_and_then() -> None:
    losses = TensorDict({"loss": torch.zeros((), device="meta")})
    for step in range(1, 50):  # to look at a meta tensor would be an error
        check_losses(losses, losses["loss"], losses, "It", step)
    with pytest.raises(RuntimeError, match="meta"):
        check_losses(losses, losses["loss"], losses, "It", 50)
    bad = TensorDict({"loss": torch.tensor(float("nan"))})
    with pytest.raises(NonFiniteLossError, match="gradient step 7"):
        check_losses(bad, bad["loss"], bad, "It", 7)


def test_updates_of_the_policy_wait_for_nothing(monkeypatch) -> None:
    monkeypatch.setattr("torchrl_wm.trainers.learning.check_losses", lambda *_: None)
    trainer = trained(MBPOTrainer, **{**MBPO, "steps": 30, "evaluation_interval": 0})
    batch = trainer.data.sample(16)
    with Waits() as waits:
        for _ in range(5):
            losses = trainer.recipe.update_policy(batch)
    assert waits.count == 0
    assert all(isinstance(value, torch.Tensor) for value in losses.values())


@pytest.mark.parametrize("given", [{}, {"elites": 2}])
def test_trainings_wait_as_often_however_long_they_are(given, monkeypatch) -> None:
    monkeypatch.setattr("torchrl_wm.trainers.learning.check_losses", lambda *_: None)
    trainer = trained(PETSTrainer, **{**PETS, "trials": 1, **given})
    counts = []
    for steps in (100, 300):
        with Waits() as waits:
            losses = trainer.recipe.fit_model(steps)
        counts.append(waits.count)
    assert counts[0] == counts[1] < 30
    assert all(isinstance(value, torch.Tensor) for value in losses.values())


# Where things are ------------------------------------------------------------


def test_the_parts_of_a_recipe_are_on_its_device(monkeypatch) -> None:
    def apply(self, fn, recurse=True):
        # Tensordict's own sets .data, which tensors without memory do not take.
        self._param_td = self._param_td.copy()
        return nn.Module._apply(self, fn, recurse=recurse)

    monkeypatch.setattr(TensorDictParams, "_apply", apply)
    recipe = MBPOTrainer(**{**MBPO, "device": "meta"}).recipe
    for module in (recipe.world_model, recipe.policy, recipe.learner.loss):
        tensors = [*module.parameters(), *module.buffers()]
        assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {each.device.type for each in recipe.sac.parameters()} == {"meta"}
    assert recipe.imagined_env.device.type == "meta"
    for buffer in (recipe.replay, recipe.imagined):
        assert buffer.storage.device.type == "meta"
    # The real env is where it was.
    assert make_real_env("Pendulum-v1").reset()["observation"].device.type == "cpu"
    rows = recipe.env.rollout(3)
    assert rows["observation"].device.type == "cpu"
    recipe.replay.extend(recipe.kept(rows))
    assert recipe.replay[:]["observation"].device.type == "meta"


def test_what_acts_mixes_random_actions_in_on_the_policys_device() -> None:
    env = make_real_env("Pendulum-v1")
    policy = TensorDictModule(lambda x: x[..., :1], ["observation"], ["action"])
    episodes = Episodes(env, 3, [])
    acting = Acting(policy, env, episodes)
    for flags in ([True] * 3, [False] * 3, [True, False, True]):
        episodes.random = torch.tensor(flags)
        seen = TensorDict({"observation": torch.zeros(3, 3)}, [3], device="meta")
        assert acting(seen)["action"].device.type == "meta"
        assert acting(seen)["action"].shape == (3, 1)


def test_a_policy_that_is_elsewhere_in_part() -> None:
    env = make_real_env("CartPole-v1")
    spec = env.action_spec
    values = QValueActor(MLP(4, 2, num_cells=[8]), spec=spec).to("meta")
    exploring = EGreedyModule(spec)
    policy = TensorDictSequential(values, exploring)
    config = RunConfig(env="CartPole-v1")
    with pytest.raises(
        ValueError, match=r"'module\.1\.eps.* on cpu.*on meta.*policy\.to"
    ):
        RealSteps(config, "CartPole-v1", env, policy, torch.device("meta"))
    RealSteps(config, "CartPole-v1", env, policy.to("meta"), torch.device("meta"))


def test_the_newest_rows_on_a_device() -> None:
    replay = make_replay(10, "meta")
    replay.extend(TensorDict({"x": torch.zeros(8, 2)}, [8]))
    assert sample_newest(replay, 5, 3)["x"].shape == (5, 2)
    replay = make_replay(4)
    for row in range(6):
        replay.extend(TensorDict({"x": torch.tensor([row])}, [1]))
    assert sample_newest(replay, 200, 2)["x"].unique().tolist() == [4, 5]


def test_replay_on_a_device() -> None:
    replay = make_replay(10, "meta")
    replay.extend(TensorDict({"x": torch.zeros(4, 2)}, [4]))
    assert replay.sample(3)["x"].device.type == "meta"
    assert RunConfig(device="meta").device == "meta"


# Random states --------------------------------------------------------------


def drawn() -> list[float]:
    return [float(torch.rand(())), float(np.random.rand()), random.random()]


def test_forked_random_leaves_all_states() -> None:
    def seed() -> None:
        torch.manual_seed(3), np.random.seed(3), random.seed(3)

    seed()
    expected = drawn()
    seed()
    with forked_random():
        assert drawn() == expected  # they go on inside ...
    assert drawn() == expected  # ... and have not been used outside
    seed()
    with pytest.raises(KeyError):
        with forked_random(7):
            first = drawn()
            raise KeyError
    assert drawn() == expected != first
    with forked_random(7):
        with forked_random(8):
            assert drawn() != first
        assert drawn() == first


@RECIPES
def test_evaluations_use_no_random_state(kind, settings) -> None:
    trainer = trained(kind, **{**settings, "evaluation_interval": 0})
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = trainer.returns(2, seed=3)
    drawn_in_between = drawn()
    assert trainer.returns(2, seed=3) == first
    torch.set_rng_state(states[0])
    assert float(torch.rand(())) == drawn_in_between[0]
    assert np.array_equal(states[1], np.random.get_state()[1]) or states[2]


# On a GPU -------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("number", [1, 2])
@RECIPES
def test_a_run_on_a_gpu(kind, settings, number, tmp_path) -> None:
    settings = {**settings, "num_envs": number, "env": "_real_envs:Ragged"}
    settings["device"] = "cuda"
    interrupt(kind.start(tmp_path / "run", **settings), 30 // number)
    again = kind.resume(tmp_path / "run")
    assert again.collected_frames > 0
    again.train()
    recipe = again.recipe
    modules = [recipe.world_model, recipe.policy]
    if hasattr(recipe, "learner"):
        modules.append(recipe.learner.loss)
    modules += [part for part in recipe.parts.values() if isinstance(part, nn.Module)]
    for module in modules:
        for tensor in [*module.parameters(), *module.buffers()]:
            assert tensor.device.type == "cuda"
    assert recipe.replay[:].device.type == "cuda"
    assert again.is_over and all(
        np.isfinite(row["return"]) for row in again.metrics if "return" in row
    )
    before = torch.cuda.get_rng_state()
    assert len(again.evaluate(1)[0]["observation"]) >= 3
    assert torch.equal(before, torch.cuda.get_rng_state())
    # The same run where there is no GPU.
    on_cpu = kind.resume(tmp_path / "run", device="cpu")
    assert (on_cpu.data[:] == again.data[:].cpu()).all()
    assert np.isfinite(on_cpu.returns(1)).all()


@pytest.mark.gpu
@RECIPES
def test_updates_on_a_gpu_wait_for_nothing(kind, settings) -> None:
    trainer = trained(kind, **{**settings, "device": "cuda"})
    before = torch.cuda.get_sync_debug_mode()
    if kind is TDMPC2Trainer:
        steps = trainer.new_steps  # of one env
        trainer.recipe.learn(steps)
        while trainer.counts.updates % 50 == 0 or trainer.counts.updates % 50 > 25:
            trainer.recipe.learn(steps)  # every 50th looks at its losses
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(20):
                trainer.recipe.learn(steps)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return
    trainer.learner.steps = 1  # the first step is looked at
    rows = trainer.learner._counted(trainer.data[:], 20)
    batches = list(trainer.learner._batches(rows, 20))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            trainer.learner.loss(batch).select(*trainer.learner.loss.out_keys).sum(
                reduce=True
            ).backward()
            trainer.learner.optimizer.step()
        if kind is MBPOTrainer:
            trainer.counts.updates = 1
            for _ in range(20):
                trainer.recipe.update_policy(trainer.data[:16])
    finally:
        torch.cuda.set_sync_debug_mode(before)
