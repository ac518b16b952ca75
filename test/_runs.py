"""Runs for tests: interrupted ones, compared ones, and small settings of them."""

from __future__ import annotations

import pytest
import torch
from _real_envs import (
    DREAMER as SMALL_DREAMER,
    MBPO as SMALL_MBPO,
    PETS as SMALL_PETS,
    PLANET as SMALL_PLANET,
    TDMPC2 as SMALL_TDMPC2,
)

from torchrl_wm.trainers import (
    DreamerTrainer,
    MBPOTrainer,
    PETSTrainer,
    PlaNetTrainer,
    RecipeTrainer,
    RunFolder,
    TDMPC2Trainer,
)

PETS = {
    **SMALL_PETS,
    "trials": 3,
    "random_hold": 3,
    "model_interval": 5,
    "logger": "csv",
}
MBPO = {
    **SMALL_MBPO,
    "random_hold": 3,
    "horizon_schedule": (20, 75, 1, 3),
    "steps": 75,
    "evaluation_interval": 25,
    "evaluation_episodes": 1,
    "logger": "csv",
}
TDMPC2 = {**SMALL_TDMPC2, "random_hold": 3, "steps": 75, "evaluation_interval": 25}
DREAMER = {**SMALL_DREAMER, "random_hold": 3, "steps": 75, "evaluation_interval": 25}
PLANET = {**SMALL_PLANET, "random_hold": 3, "steps": 75, "evaluation_interval": 25}
RECIPES = pytest.mark.parametrize(
    "kind, settings",
    [
        (PETSTrainer, PETS),
        (MBPOTrainer, MBPO),
        (TDMPC2Trainer, TDMPC2),
        (DreamerTrainer, DREAMER),
        (PlaNetTrainer, PLANET),
    ],
    ids=["pets", "mbpo", "tdmpc2", "dreamer", "planet"],
)


class Interrupted(Exception):
    """What stops a run in a test."""


def interrupt(trainer: RecipeTrainer, after: int) -> None:
    """Have the run stop as by a kill, in the midst of the episode that follows."""
    acting, steps = trainer.collector.acting.forward, []

    def forward(tensordict):
        steps.append(1)
        if len(steps) > after:
            raise Interrupted
        return acting(tensordict)

    trainer.collector.acting.forward = forward
    with pytest.raises(Interrupted):
        trainer.train()


def without_times(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def assert_same(one: RecipeTrainer, other: RecipeTrainer) -> None:
    """Two runs that are over made the same steps, learnt the same and measured the same."""
    assert (one.data[:] == other.data[:]).all()
    assert one.data.write_count == other.data.write_count
    for name, part in one.recipe.parts.items():
        if isinstance(part, torch.nn.Module):
            theirs = other.recipe.parts[name].state_dict()
            for key, value in part.state_dict().items():
                assert torch.equal(value, theirs[key]), (name, key)
    if one.world_model is not None:
        theirs = other.world_model.state_dict()
        for key, value in one.world_model.state_dict().items():
            assert torch.equal(value, theirs[key]), key
    for mine, theirs in zip(one.policy.parameters(), other.policy.parameters()):
        assert torch.equal(mine, theirs)
    assert without_times(one.metrics) == without_times(other.metrics)
    for trainer in (one, other):
        if trainer.run is not None:
            kept = RunFolder.open(trainer.run.path).metrics()
            assert without_times(kept) == without_times(trainer.metrics)
