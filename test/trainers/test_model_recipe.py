"""A world model of logged data alone, as a run: it goes on, and ends later."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _runs import Interrupted, without_times

from torchrl_wm.trainers import resume_run, start_run


@pytest.fixture
def settings(tmp_path) -> dict:
    """Of a run on four episodes of two observations, one of them nested."""
    rng, steps = np.random.default_rng(0), 60
    path = tmp_path / "log.npz"
    arrays = {
        name: rng.normal(size=(steps, size))
        for name, size in (("observations/arm/angle", 2), ("observations/speed", 1))
    }
    arrays |= {
        f"next_{name}": values + 0.1 * rng.normal(size=values.shape)
        for name, values in arrays.items()
    }
    np.savez(
        path,
        **arrays,
        actions=rng.uniform(-1, 1, (steps, 1)),
        rewards=rng.normal(size=steps),
        terminations=np.zeros(steps, bool),
        truncations=np.arange(1, steps + 1) % 15 == 0,
    )
    small = {"hidden": (8,), "members": 3, "elites": 2, "batch_size": 8}
    return {"data": str(path), "interval": 4, "steps": 16, "logger": "csv", **small}


def whole_run(settings: dict, path):
    trainer = start_run("model", path, **settings)
    trainer.train()
    return trainer


def assert_same(one, other) -> None:
    assert without_times(one.metrics) == without_times(other.metrics)
    theirs = torch.load(other.run.path / "model.pt", weights_only=True)
    mine = torch.load(one.run.path / "model.pt", weights_only=True)
    assert str(mine) == str(theirs)
    for p, q in zip(one.world_model.parameters(), other.world_model.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("looks", [1, 3])
def test_it_goes_on_to_the_bit(looks, settings, tmp_path) -> None:
    settings["checkpoint_interval"] = looks
    trainer = start_run("model", tmp_path / "run", **settings)

    def stop(step: int, steps: int) -> None:
        if trainer.collected_frames == 16 and step == 2:
            raise Interrupted

    trainer.recipe.on_fit = stop
    with pytest.raises(Interrupted):
        trainer.train()
    again = resume_run(tmp_path / "run")
    assert again.collected_frames == 12
    again.train()
    assert_same(again, whole_run(settings, tmp_path / "whole"))


def test_it_is_made_longer(settings, tmp_path) -> None:
    whole_run({**settings, "steps": 8}, tmp_path / "run")
    longer = resume_run(tmp_path / "run", steps=16)
    longer.train()
    assert_same(longer, whole_run(settings, tmp_path / "whole"))


def test_a_longer_run_looks_where_others_do(settings, tmp_path) -> None:
    whole_run({**settings, "steps": 6}, tmp_path / "run")
    longer = resume_run(tmp_path / "run", steps=13)
    longer.train()
    assert [row["step"] for row in longer.metrics] == [4, 6, 8, 12, 13]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_some_and_not_all_is_held_out(share, settings, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"held_out must be a share .*got {share}"):
        start_run("model", tmp_path / "run", **{**settings, "held_out": share})
    assert not (tmp_path / "run").exists()
