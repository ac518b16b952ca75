"""Sequences out of a replay of single steps: in order, of one env each, up to the newest."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from torchrl_wm.trainers.recipe import make_replay
from torchrl_wm.trainers.sequences import sample_sequences


def filled(steps: int, num_envs: int, capacity: int = 1000):
    replay = make_replay(capacity)
    for step in range(steps):
        rows = {
            "step": torch.full((num_envs,), step),
            ("agent", "env"): torch.arange(num_envs),
        }
        replay.extend(TensorDict(rows, [num_envs]))
    return replay


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("capacity", [1000, 20, 21])
@pytest.mark.parametrize("length", [1, 4])
def test_they_are_consecutive(num_envs, capacity, length) -> None:
    replay = filled(17, num_envs, capacity)
    batch = sample_sequences(replay, 400, length, num_envs)
    assert batch.batch_size == (400, length)
    first = batch["step"][:, :1]
    assert torch.equal(batch["step"], first + torch.arange(length))
    envs = batch["agent", "env"]
    assert torch.equal(envs, envs[:, :1].expand(400, length))
    kept = replay[:]
    # All that the replay holds is drawn, the newest and the oldest step, too.
    assert batch["step"].max() == 16
    whole = min(len(kept), 17 * num_envs)
    assert batch["step"].min() == -(-(17 * num_envs - whole) // num_envs) or (
        batch["step"].min() == kept["step"].min()
    )


def test_too_few_steps() -> None:
    with pytest.raises(
        ValueError, match="holds 4 steps of 2 envs, and no sequence of 3"
    ):
        sample_sequences(filled(2, 2), 5, 3, 2)
    assert len(sample_sequences(filled(3, 2), 5, 3, 2)) == 5
