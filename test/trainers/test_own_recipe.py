"""A recipe of one's own: it trains, goes on, is made longer and evaluated as ours are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pytest
import torch
from _runs import assert_same, interrupt, without_times
from tensordict.nn import TensorDictModule
from torch import nn

from torchrl_wm import _registry
from torchrl_wm.trainers import (
    Recipe,
    register_recipe,
    resume_run,
    RunConfig,
    RunFolder,
    start_run,
    Steps,
    trainer_class,
)
from torchrl_wm.trainers.recipe import Counts, make_replay
from torchrl_wm.trainers.settings import AtLeast


@dataclass(frozen=True, kw_only=True)
class ImitationConfig(RunConfig):
    """The settings of :class:`Imitation`.

    Args:
        updates: how many updates follow each step.
        rate: the learning rate.
    """

    random_steps: Annotated[int, AtLeast(1)] = 15
    updates: Annotated[int, AtLeast(1)] = 2
    rate: float = 0.01


class Imitation(Recipe):
    """Imitate those of the steps, half of them, that gave the most reward."""

    config_class = ImitationConfig

    def __init__(self, config: ImitationConfig, env) -> None:
        super().__init__(config, env)
        (key,), size = env.observation_keys[:1], env.action_spec.shape[-1]
        width = env.full_observation_spec_unbatched[key].shape[-1]
        network = nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, size))
        self.policy = TensorDictModule(network, [key], [env.action_key]).to(self.device)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), config.rate)
        self.replay, self.counts = make_replay(500, self.device), Counts(updates=0)
        self.keys = [key, env.action_key, ("next", env.reward_key)]
        self.parts = {
            "values": self.policy,  # a name that modules of modules do not take
            "optimizer": self.optimizer,
            "replay": self.replay,
            "counts": self.counts,
        }

    def kept(self, steps):
        return steps.select(*self.keys)

    def learn(self, steps: Steps) -> dict[str, torch.Tensor]:
        for _ in range(self.config.updates * steps.count):
            batch = self.replay.sample(32)
            reward = batch[self.keys[2]]
            good = (reward >= reward.median()).float()
            made = self.policy(batch.select(self.keys[0]))[self.keys[1]]
            loss = (good * (made - batch[self.keys[1]]) ** 2).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.counts.updates += 1
        return {"loss_imitation": loss.detach()}


SETTINGS = {
    "env": "_real_envs:Ragged",
    "steps": 60,
    "logger": "csv",
    "evaluation_interval": 25,
    "evaluation_episodes": 2,
}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(_registry, "_REGISTERED", {})
    register_recipe("imitation", Imitation)


@pytest.mark.parametrize("number", [1, 3])
def test_it_trains_and_goes_on_to_the_bit(number, tmp_path) -> None:
    settings = {**SETTINGS, "num_envs": number}
    whole = trainer_class("imitation")(**settings)
    whole.train()
    interrupt(start_run("imitation", tmp_path / "run", **settings), 44 // number)
    again = resume_run(tmp_path / "run")
    assert type(again.recipe) is Imitation and again.collected_frames >= 15
    again.train()
    assert_same(again, whole)
    assert again.counts.updates == whole.counts.updates > 60
    rows = RunFolder.open(tmp_path / "run").metrics()
    assert any("loss_imitation" in row for row in rows)
    evaluated = [row["step"] for row in rows if "evaluation_return" in row]
    assert evaluated == {1: [25, 50], 3: [27, 51]}[number]


def test_it_learns_and_is_evaluated(tmp_path) -> None:
    settings = {**SETTINGS, "steps": 500, "evaluation_interval": 0, "updates": 3}
    trainer = start_run("imitation", tmp_path / "run", **settings)
    untrained = trainer.returns(8)
    trainer.train()
    again = resume_run(tmp_path / "run")
    returns = again.returns(8)
    assert returns == trainer.returns(8)  # the same episodes, whoever looks
    assert np.isfinite(returns).all() and returns != untrained
    episode = again.evaluate(1, seed=5)[0]
    assert torch.equal(
        episode["observation"], again.evaluate(1, seed=5)[0]["observation"]
    )


def test_it_is_made_longer(tmp_path) -> None:
    whole = trainer_class("imitation")(**{**SETTINGS, "steps": 90})
    whole.train()
    start_run("imitation", tmp_path / "run", **SETTINGS).train()
    again = resume_run(tmp_path / "run", steps=90)
    again.train()
    assert without_times(again.metrics) == without_times(whole.metrics)
    assert resume_run(tmp_path / "run").config.steps == 90


def test_its_settings_are_its_own() -> None:
    with pytest.raises(ValueError, match="updates must be at least 1, got 0"):
        ImitationConfig(updates=0)
    with pytest.raises(TypeError, match="ImitationConfig has no setting 'members'"):
        trainer_class("imitation")(members=3)


# What is forgotten -----------------------------------------------------------


def test_a_replay_that_is_no_part() -> None:
    class Forgetful(Imitation):
        def __init__(self, config, env) -> None:
            super().__init__(config, env)
            del self.parts["replay"]

    with pytest.raises(ValueError, match="replay of the recipe .* none of its parts"):
        trainer_class(Forgetful)(**SETTINGS)


def test_no_policy() -> None:
    class Idle(Imitation):
        def __init__(self, config, env) -> None:
            super().__init__(config, env)
            self.policy = None

    with pytest.raises(TypeError, match="Idle sets no policy. Set self.policy"):
        trainer_class(Idle)(**SETTINGS)


def test_names_of_the_runs_own_parts(tmp_path) -> None:
    class Clashing(Imitation):
        def __init__(self, config, env) -> None:
            super().__init__(config, env)
            self.parts["episodes"] = Counts(x=1)

    register_recipe("clashing", Clashing)
    with pytest.raises(ValueError, match=r"parts \['episodes'\].*Rename them"):
        start_run("clashing", tmp_path / "run", **SETTINGS)
    assert not (tmp_path / "run").exists()


def test_a_part_that_cannot_be_saved(tmp_path) -> None:
    class Counting(Imitation):
        def __init__(self, config, env) -> None:
            super().__init__(config, env)
            self.parts["updates"] = 3

    register_recipe("counting", Counting)
    with pytest.raises(TypeError, match="'updates' is a int.*no state_dict.*Counts"):
        start_run("counting", tmp_path / "run", **SETTINGS)
    assert not (tmp_path / "run").exists()
