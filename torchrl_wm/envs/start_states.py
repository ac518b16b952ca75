"""Where imagined episodes begin: a source of states for a given batch size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Union

import torch
from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer, ReplayBufferEnsemble
from torchrl.envs import EnvBase

StartStates = Union[
    EnvBase, ReplayBuffer, TensorDictBase, Callable[[torch.Size], TensorDictBase]
]
Sampler = Callable[[torch.Size], TensorDictBase]


def make_sampler(source: StartStates) -> Sampler:
    """Return a function from a batch size to as many start states drawn from ``source``.

    Args:
        source: an env (its resets), a replay buffer (its samples), a
            tensordict (random rows of it), or a function of the batch size.

    Raises:
        TypeError: if ``source`` is none of these.
    """
    forms = (
        (EnvBase, _from_env),
        (ReplayBufferEnsemble, _from_sample),
        (ReplayBuffer, _from_buffer),
        (TensorDictBase, _random_rows),
    )
    for kind, draw in forms:
        if isinstance(source, kind):
            return partial(draw, source)
    if callable(source):
        return partial(_from_callable, source)
    raise TypeError(
        f"start_states must be a TorchRL env (wrap a Gymnasium one: torchrl.envs.GymWrapper(env)), "
        f"a replay buffer, a tensordict or a function of the batch size that returns a "
        f"tensordict, got {type(source).__name__}."
    )


def _from_env(env: EnvBase, size: torch.Size) -> TensorDictBase:
    first = env.reset()
    if first.batch_size == size:
        return first
    # One reset gives as many states as the env has copies: reset until enough.
    rows = [first.reshape(-1)]
    while sum(len(row) for row in rows) < size.numel():
        rows.append(env.reset().reshape(-1))
    return torch.cat(rows)[: size.numel()].reshape(size)


def _from_buffer(buffer: ReplayBuffer, size: torch.Size) -> TensorDictBase:
    if not len(buffer):
        raise RuntimeError(
            "start_states is an empty replay buffer: there is no state to start from. "
            "Extend it with real transitions before env.reset() or env.rollout(...)."
        )
    if getattr(buffer.storage, "ndim", 1) > 1:
        return _random_rows(buffer[:], size)
    # By index: to sample would advance the sampler and the prefetched batches
    # that training draws from the same buffer.
    drawn = buffer[torch.randint(len(buffer), (size.numel(),))]
    if drawn.batch_size == (size.numel(),):
        return drawn.reshape(size)
    return _random_rows(drawn, size)  # each element is a trajectory


def _from_sample(buffer: ReplayBufferEnsemble, size: torch.Size) -> TensorDictBase:
    return _random_rows(buffer.sample(size.numel()), size)


def _random_rows(tensordict: TensorDictBase, size: torch.Size) -> TensorDictBase:
    if not tensordict.batch_size.numel():
        raise RuntimeError(
            f"start_states is a tensordict without rows (batch size "
            f"{tuple(tensordict.batch_size)}): there is no state to start from."
        )
    if not tensordict.batch_dims:
        return tensordict.expand(size).clone()
    rows = tensordict.reshape(-1)
    index = torch.randint(len(rows), (size.numel(),), device=rows.device)
    return rows[index].reshape(size)


def _from_callable(source: Sampler, size: torch.Size) -> TensorDictBase:
    out = source(size)
    if not isinstance(out, TensorDictBase) or out.batch_size != size:
        got = (
            f"batch size {tuple(out.batch_size)}"
            if isinstance(out, TensorDictBase)
            else type(out).__name__
        )
        raise RuntimeError(
            f"start_states was called with the batch size {tuple(size)} and must return a "
            f"TensorDict of that batch size, got {got}."
        )
    return out
