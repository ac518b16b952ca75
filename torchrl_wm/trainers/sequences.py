"""Sequences of consecutive real steps out of a replay of single ones."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer


def sample_sequences(
    replay: ReplayBuffer, number: int, length: int, num_envs: int = 1
) -> TensorDictBase:
    """Return sequences that begin at steps drawn at random, with replacement.

    Every step has the same probability of being the first one, the last ones of episodes
    included. A sequence may go on into the next episode; ``("next", "done")`` and
    ``is_init`` mark where it begins.
    :class:`~torchrl_wm.WorldModelLoss` with ``multi_step=True`` ends the comparison there.

    Args:
        replay: the steps of a run; the envs take turns.
        number: the number of sequences.
        length: the number of steps of each.
        num_envs: the number of envs that take turns in the replay.

    Returns:
        ``[number, length]``.

    Raises:
        ValueError: if the replay is shorter than one sequence.

    Examples:
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> from torchrl_wm.trainers import make_real_env, sample_sequences
        >>> replay = TensorDictReplayBuffer(storage=LazyTensorStorage(100))
        >>> env = make_real_env("CartPole-v1", seed=0)
        >>> _ = replay.extend(env.rollout(60, break_when_any_done=False))
        >>> sample_sequences(replay, 4, 32)["is_init"].shape
        torch.Size([4, 32, 1])
    """
    storage, size = replay.storage, len(replay)
    starts = size - (length - 1) * num_envs
    if starts < 1:
        raise ValueError(
            f"The replay holds {size} steps of {num_envs} envs, and no sequence of {length}. Make "
            f"more random steps first, or shorten the horizon."
        )
    device = storage.device
    if isinstance(device, str):  # "auto" until the first rows are in
        device = None
    first = torch.randint(starts, (number, 1), device=device)
    rows = first + num_envs * torch.arange(length, device=device)
    # In a full buffer, the next row replaces the oldest one.
    oldest = replay.write_count - size
    return storage[(oldest + rows) % storage.max_size]
