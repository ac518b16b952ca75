"""Minari datasets: where they are, their episodes, and the specs of their actions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey
from torchrl.data import Binary, Bounded, MultiOneHot, OneHot, TensorSpec, Unbounded

from torchrl_wm.trainers.logged_actions import as_spec, start_of_space

#: The arrays of an episode that are read.
_ARRAYS = ("observations", "actions", "rewards", "terminations", "truncations")


def _minari() -> Any:
    try:
        import minari
    except ImportError as err:
        raise ImportError(
            "Minari datasets need minari: pip install 'torchrl-wm[minari]'."
        ) from err
    return minari


def minari_dataset(name: str) -> Any:
    """Return the dataset of an id, if it is on this machine."""
    minari = _minari()
    known = minari.list_local_datasets()
    if name not in known:
        raise FileNotFoundError(
            f"There is no Minari dataset {name!r} on this machine; there are {sorted(known)}. "
            f"Nothing is downloaded here: minari download {name} does it."
        )
    return minari.load_dataset(name, download=False)


def minari_folder(folder: Path) -> Any:
    """Return the dataset in a folder."""
    return _minari().MinariDataset(folder)


def is_minari(source: Any) -> bool:
    """Return whether a source is a dataset of Minari."""
    return hasattr(source, "iterate_episodes") and hasattr(source, "action_space")


def minari_episodes(dataset: Any) -> tuple[list[dict[str, Any]], Any]:
    """Return the episodes of a dataset, and the space of its actions."""
    episodes = [
        {name: getattr(episode, name) for name in _ARRAYS}
        for episode in dataset.iterate_episodes()
    ]
    return episodes, dataset.action_space


def of_space(
    key: NestedKey, value: torch.Tensor, space: Any
) -> tuple[torch.Tensor, TensorSpec | None]:
    """Return actions of a Gymnasium space as ``GymEnv`` has them, and their spec.

    Args:
        key: the key of the entry, for messages.
        value: the actions of the space, ``[N, *A]``.
        space: the space.

    Returns:
        The actions, and their spec; None if the space says no more than the values.
    """
    kind = type(space).__name__  # Gymnasium's or Gym's
    spec: TensorSpec | None = None
    if kind == "Discrete":
        spec = OneHot(int(space.n), dtype=torch.int64)
    elif kind == "MultiDiscrete":
        if len(space.shape) != 1:
            raise ValueError(
                f"The actions {key!r} are of a MultiDiscrete space of the shape {space.shape}; "
                f"one dim is needed. Pass them as arrays, actions.reshape(N, -1)."
            )
        spec = MultiOneHot([int(n) for n in space.nvec], dtype=torch.int64)
    elif kind == "MultiBinary":
        spec = Binary(space.shape[-1], shape=space.shape, dtype=torch.int8)
    elif kind == "Box":
        # Integers are quantities here as well, and would otherwise be taken for choices.
        dtype = value.dtype if value.is_floating_point() else torch.float32
        form = {"shape": torch.Size(space.shape), "dtype": dtype}
        spec = Unbounded(**form)
        if np.isfinite(space.low).all() and np.isfinite(space.high).all():
            bounds = (torch.as_tensor(b).to(dtype) for b in (space.low, space.high))
            spec = Bounded(*bounds, **form)
    if spec is None:
        return value, None
    return as_spec(key, value, spec, "the dataset", start=start_of_space(space)), spec
