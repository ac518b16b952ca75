"""Sequences of consecutive real steps out of a replay of single ones."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer


def sample_sequences(
    replay: ReplayBuffer, number: int, length: int, num_envs: int = 1
) -> TensorDictBase:
    """Return sequences that begin at steps drawn at random, with replacement.

    Each step is as likely to be the first one, the last ones of episodes included: a sequence
    may go on into the next episode, where ``("next", "done")`` and ``is_init`` say so.
    :class:`~torchrl_wm.WorldModelLoss` with ``multi_step=True`` ends the comparison there.

    Args:
        replay: steps as a run makes them, one of each env after the other.
        number: how many sequences.
        length: how many steps each has.
        num_envs: how many envs take turns in the replay.

    Returns:
        ``[number, length]``.

    Raises:
        ValueError: if the replay holds no sequence of that length yet.
    """
    storage, size = replay.storage, len(replay)
    starts = size - (length - 1) * num_envs
    if starts < 1:
        raise ValueError(
            f"The replay holds {size} steps of {num_envs} envs, and no sequence of {length}. Make "
            f"more random steps first, or shorten the horizon."
        )
    device = storage.device
    device = (
        None if isinstance(device, str) else device
    )  # "auto" until the first rows are in
    first = torch.randint(starts, (number, 1), device=device)
    rows = first + num_envs * torch.arange(length, device=device)
    # Of a full buffer, the oldest row is where the next one will be written.
    oldest = replay.write_count - size
    return storage[(oldest + rows) % storage.max_size]
