"""Transitions that somebody else recorded: arrays, replay buffers, tensordicts, Minari datasets."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import ReplayBuffer
from torchrl.envs import EnvBase

from torchrl_wm.models import EnvSpecs, read_specs
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.filtering import episode_begins
from torchrl_wm.modules.keys import (
    as_tuple,
    join,
    leaf_keys,
    missing_from,
    sibling,
    unique,
)
from torchrl_wm.trainers.logged_entries import (
    check_names,
    check_observed_actions,
    ENDS,
    narrowed,
)

#: What :func:`load_transitions` takes.
DataSource = Union[
    str,
    os.PathLike,
    TensorDictBase,
    ReplayBuffer,
    Mapping[str, Any],
    Sequence[Mapping[str, Any]],
]
#: The names of arrays.
NAMES = ("observations", "actions", "rewards", "terminations")
OPTIONAL = ("truncations", "next_observations")
_MINARI = "minari:"


def load_transitions(
    source: DataSource, *, env: EnvBase | None = None
) -> TensorDictBase:
    """Read recorded transitions.

    Args:
        source: one of

            - a dictionary of arrays of ``N`` steps: ``observations`` ``[N, *O]``, ``actions``
              ``[N, *A]``, ``rewards`` ``[N]``, ``terminations`` ``[N]``,
              ``next_observations`` ``[N, *O]`` and, optionally, ``truncations`` ``[N]``;
            - the same without ``next_observations`` and with ``observations``
              ``[N + 1, *O]``: the arrays of one episode, its last observation included;
            - a list of such dictionaries, one for each episode;
            - a file ``.npz`` with the arrays of one dictionary;
            - a replay buffer of TorchRL, or the folder that ``buffer.dumps(folder)`` wrote;
            - a tensordict ``[*B, T]`` of TorchRL's form (``observation``, ``action``,
              ``("next", "observation")``, ``("next", "reward")``, ``("next", "terminated")``,
              ...), or the folder that ``tensordict.memmap(folder)`` wrote;
            - ``"minari:<id>"``, a Minari dataset on this machine, the folder of one, or a
              ``minari.MinariDataset``. Nothing is downloaded.

            Observations may be dictionaries of arrays, nested ones too; in an ``.npz`` file
            their names are joined by slashes, ``observations/position``. Names that mean
            something else in a transition (``action``, ``reward``, ``done``, ...) are
            refused.

    Keyword Args:
        env: the env that was recorded, whose specs the transitions are to have. Needed for
            actions that are class numbers in arrays, which become one-hot as in ``GymEnv``.

    Returns:
        Transitions ``[N]``, in the order of recording: the observations (an array under
        ``"observation"``, dictionaries under their own keys), ``"action"``, and below
        ``"next"`` the observations, ``"reward"``, ``"terminated"``, ``"truncated"`` and
        ``"done"``, each ``[N, 1]``. What is float64 becomes float32, unless it is float64 in
        ``env`` or, without one, float32 numbers are too far apart for it, as they are for
        seconds since 1970; where ``env`` has such an entry in float32, a warning names it.
        Entries of tensordicts keep their keys.

        Where a row, a dictionary or a buffer ends before its episode does, its last step is
        truncated, as is one before a step that begins an episode (``is_init``) or belongs to
        another (``("collector", "traj_ids")``): nothing follows it. Buffers that are full are
        read from their oldest step on.

    Raises:
        FileNotFoundError: if there is no such file, folder or dataset.
        KeyError: if an array or entry is missing; the message names it.
        ValueError: if lengths or shapes do not fit, an observation has the name of something
            else, or what is there is none of these.

    .. note:: The folders of tensordicts may hold pickled objects, which run code when they are
       loaded. Load those that you trust.

    Examples:
        >>> import numpy as np
        >>> from torchrl_wm.trainers import load_transitions
        >>> episode = {
        ...     "observations": np.zeros((6, 3)),  # one more than there are steps
        ...     "actions": np.zeros((5, 1)),
        ...     "rewards": np.zeros(5),
        ...     "terminations": np.array([False] * 4 + [True]),
        ... }
        >>> data = load_transitions([episode, episode])
        >>> data.shape, data["next", "observation"].shape
        (torch.Size([10]), torch.Size([10, 3]))
    """
    classes = None
    if isinstance(source, (str, os.PathLike)):
        source = _read(source)
    if isinstance(source, ReplayBuffer):
        source = _content(source)
    if _is_minari(source):
        source, classes = _minari_episodes(source)
    if isinstance(source, TensorDictBase):
        data = _flat(source)
    elif isinstance(source, Mapping):
        data = _from_arrays(source, "the data", env is not None)
    elif isinstance(source, Sequence) and source:
        known = env is not None
        parts = [_from_arrays(e, f"episode {n}", known) for n, e in enumerate(source)]
        data = torch.cat(parts)
    else:
        raise ValueError(
            f"There is nothing to read: expected arrays, a replay buffer, a tensordict or a Minari "
            f"dataset, got {type(source).__name__}."
        )
    if not len(data):
        raise ValueError("The data holds no transition.")
    if env is None:  # whose specs would say what an entry is
        check_observed_actions(data)
    data = narrowed(data, env)
    if classes is not None:
        data.set("action", _one_hot(data.get("action"), classes))
    if env is not None:
        data = _as_specified(data, env)
    return data


# Arrays --------------------------------------------------------------------------


def _from_arrays(
    arrays: Mapping[str, Any], what: str, known: bool = False
) -> TensorDictBase:
    """The transitions of one dictionary, ``[N]``; ``known``: see :func:`check_names`."""
    if not isinstance(arrays, Mapping):
        raise ValueError(
            f"{what} must be a dictionary of arrays, got {type(arrays).__name__}."
        )
    unknown = sorted(set(arrays) - {*NAMES, *OPTIONAL})
    missing = [name for name in NAMES if name not in arrays]
    if unknown or missing:
        raise MissingEntryError(
            f"The arrays of {what} are {sorted(arrays)}: "
            + (f"{missing} are missing. " if missing else "")
            + (f"{unknown} are not known. " if unknown else "")
            + f"Needed are {list(NAMES)}; {list(OPTIONAL)} may be there."
        )
    rewards = _flags("rewards", arrays["rewards"], what).float()
    steps = len(rewards)
    if not steps:
        raise ValueError(f"{what} has no step.")
    terminated = _flags("terminations", arrays["terminations"], what).bool()
    truncated = torch.zeros(steps, 1, dtype=torch.bool)
    if "truncations" in arrays:
        truncated = _flags("truncations", arrays["truncations"], what).bool()
    actions = _tensor("actions", arrays["actions"])
    observations = _tree("observations", arrays["observations"])
    check_names(observations, what, known)
    if "next_observations" in arrays:
        following = _tree("next_observations", arrays["next_observations"])
        needed = {"next_observations": (following, steps)}
    else:
        following = {key: value[1:] for key, value in observations.items()}
        needed = {}
        ended = terminated | truncated
        if ended[:-1].any():
            raise ValueError(
                f"{what} has no next_observations and ends at step "
                f"{int(ended[:-1].float().argmax())} of {steps}: the observation after that step "
                f"is not there. Give next_observations [N, ...], or a list of episodes, each with "
                f"one observation more than steps."
            )
        steps_and_last = {key: value for key, value in observations.items()}
        needed["observations"] = (steps_and_last, steps + 1)
        _check_lengths(needed, what, steps)
        observations = {key: value[:-1] for key, value in observations.items()}
        needed = {}
    needed["observations"] = (observations, steps)
    needed["actions"] = ({"action": actions}, steps)
    needed["terminations"] = ({"": terminated}, steps)
    needed["truncations"] = ({"": truncated}, steps)
    _check_lengths(needed, what, steps)
    # What comes after the last step belongs to another episode.
    truncated[-1] |= ~terminated[-1]
    out = TensorDict({"action": actions}, batch_size=[steps])
    for key, value in observations.items():
        out.set(key, value)
        if key not in following or following[key].shape != value.shape:
            raise ValueError(
                f"next_observations of {what} do not have the shapes of observations: {key!r} is "
                f"{tuple(value.shape)}, and then "
                f"{tuple(following[key].shape) if key in following else 'missing'}."
            )
        out.set(join("next", key), following[key])
    for name, value in (
        ("reward", rewards),
        ("terminated", terminated),
        ("truncated", truncated),
        ("done", terminated | truncated),
    ):
        out.set(("next", name), value)
    return out


def _check_lengths(needed: dict[str, tuple], what: str, steps: int) -> None:
    for name, (values, length) in needed.items():
        for value in values.values():
            if len(value) != length:
                raise ValueError(
                    f"{name} of {what} has {len(value)} rows, and there are {steps} rewards, so "
                    f"{length} were expected. Without next_observations an episode has one "
                    f"observation more than rewards."
                )


def _flags(name: str, value: Any, what: str) -> torch.Tensor:
    """One number for each step, ``[N, 1]``."""
    tensor = _tensor(name, value)
    if tensor.ndim not in (1, 2) or (tensor.ndim == 2 and tensor.shape[1] != 1):
        raise ValueError(
            f"{name} of {what} must be one number for each step, [N], got "
            f"{tuple(tensor.shape)}. Several episodes are a list of dictionaries."
        )
    return tensor.reshape(-1, 1)


def _tree(name: str, value: Any, key: tuple = ()) -> dict[Any, torch.Tensor]:
    """An array, or the leaves of a dictionary of arrays by key."""
    if isinstance(value, Mapping):
        out: dict[Any, torch.Tensor] = {}
        for inner, item in value.items():
            out.update(_tree(name, item, (*key, str(inner))))
        return out
    flat = key[0] if len(key) == 1 else key or "observation"
    tensor = _tensor(name, value)
    if tensor.ndim == 1:  # discrete observations, or one number each
        tensor = tensor.unsqueeze(-1)
    return {flat: tensor}


def _tensor(name: str, value: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(np.asarray(value)).clone()
    except (TypeError, ValueError) as err:
        raise ValueError(
            f"{name} must be an array of numbers, got {type(value).__name__} ({err})."
        ) from err


# Files and folders -----------------------------------------------------------------


def _read(source: str | os.PathLike) -> Any:
    name = os.fspath(source)
    if name.startswith(_MINARI):
        return _minari_dataset(name[len(_MINARI) :])
    path = Path(source)
    if path.is_file() and path.suffix == ".npz":
        return _read_npz(path)
    for folder in (path / "storage", path):
        if (folder / "storage_metadata.json").is_file():
            return _read_storage(folder)
    if (path / "meta.json").is_file():
        return TensorDict.load_memmap(path)
    for folder in (path / "data", path):
        if (folder / "metadata.json").is_file():
            return _minari().MinariDataset(folder)
    if not path.exists():
        raise FileNotFoundError(
            f"There is no {name!r}. Name an .npz file, a folder of buffer.dumps(...), of "
            f"tensordict.memmap(...) or of a Minari dataset, or 'minari:<id>'."
        )
    raise ValueError(
        f"{name!r} is neither an .npz file, nor a folder that buffer.dumps(...) or "
        f"tensordict.memmap(...) wrote, nor that of a Minari dataset."
    )


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            flat = dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as err:
        raise ValueError(
            f"{os.fspath(path)!r} cannot be read as arrays ({err}). Arrays of objects are not "
            f"read, as they may hold code."
        ) from err
    out: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, last = name.split("/")
        place = out
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return out


def _read_storage(folder: Path) -> TensorDictBase:
    """What a replay buffer's storage holds, as :func:`_content` returns it."""
    about = _read_json(folder / "storage_metadata.json")
    if about.get("is_pytree") or not (folder / "meta.json").is_file():
        raise ValueError(
            f"The replay buffer in {os.fspath(folder)!r} holds no tensordict. Load it yourself, "
            f"buffer.loads(path), and pass its content as arrays."
        )
    data, length = TensorDict.load_memmap(folder), about["len"]
    file = folder.parent / "writer" / "metadata.json"
    writer = _read_json(file) if folder.name == "storage" and file.is_file() else {}
    # Storages of several dims hold time first, and count the steps of all rows.
    across = data.batch_size[1:].numel()
    if length > len(data) or writer.get("write_count", length) * across == length:
        times = _oldest_first(data[: length // across], 0, writer.get("cursor", 0))
        return times.transpose(0, -1) if data.batch_dims > 1 else times
    return _oldest_first(data[:length], 0, writer.get("cursor", 0))


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


# TorchRL's forms ---------------------------------------------------------------------


def _content(buffer: ReplayBuffer) -> Any:
    """All that a replay buffer holds, ``[*B, T]``, from its oldest step on."""
    if not len(buffer):
        raise ValueError("The data holds no transition: the replay buffer is empty.")
    data = buffer[:]
    cursor = getattr(buffer.writer, "_cursor", None)
    if not isinstance(data, TensorDictBase) or not isinstance(cursor, int):
        return data
    time = buffer.dim_extend
    data = _oldest_first(data, time, cursor)
    last = getattr(buffer.storage, "ndim", 1) - 1
    return data if time >= last else data.transpose(time, last)


def _oldest_first(data: TensorDictBase, dim: int, cursor: int) -> TensorDictBase:
    """The steps of a ring, whose next step would be written at ``cursor``, in their order."""
    length = data.batch_size[dim]
    if not 0 < cursor < length:
        return data
    order = torch.arange(length).roll(-cursor)
    return data[(slice(None),) * dim + (order,)]


def _flat(data: TensorDictBase) -> TensorDictBase:
    """Transitions ``[N]`` of a tensordict ``[*B, T]``; padding is left out."""
    found = {as_tuple(key)[-1] for key in leaf_keys(data) if key[0] == "next"}
    missing = [] if "reward" in found else [("next", "reward")]
    if not found & {*ENDS}:
        missing.append(("next", "done"))
    if missing:
        raise MissingEntryError(
            f"The tensordict lacks {missing}; it has {leaf_keys(data)}. Needed are observations, "
            f"actions, and below 'next' observations, rewards and dones, as rollouts have them."
        )
    if not data.batch_size.numel():
        raise ValueError("The data holds no transition.")
    data = data.copy() if data.batch_dims else data.reshape(1)
    valid = data.get(("collector", "mask"), None)
    if valid is None:
        valid = torch.ones(data.batch_size, dtype=torch.bool, device=data.device)
    valid = valid.reshape(data.batch_size)
    _end(data, _last_steps(data, valid))
    return data.reshape(-1)[valid.reshape(-1)].clone()


def _last_steps(data: TensorDictBase, valid: torch.Tensor) -> torch.Tensor:
    """The steps after which nothing of their episode was recorded, ``[*B, T]`` bool."""
    last = torch.ones_like(valid)
    last[..., :-1] = ~valid[..., 1:]
    begins = episode_begins(data)
    if begins is not None:
        last[..., :-1] |= begins[..., 1:]
    episode = data.get(("collector", "traj_ids"), None)
    if episode is not None:
        episode = episode.reshape(data.batch_size)
        last[..., :-1] |= episode[..., 1:] != episode[..., :-1]
    return last


def _end(data: TensorDictBase, last: torch.Tensor) -> None:
    """Truncate the steps ``last``, ``[*B]``, that do not terminate."""
    following = data.get("next")
    ends = [key for key in leaf_keys(following) if as_tuple(key)[-1] in ENDS]
    for key in unique(sibling(key, "done") for key in ends):
        done, terminated, truncated = (
            following.get(sibling(key, name), None) for name in ENDS
        )
        if done is None:
            done = terminated if truncated is None else truncated
            if terminated is not None:
                done = done.bool() | terminated.bool()
        done = done.bool()
        if terminated is None:
            terminated = done if truncated is None else done & ~truncated.bool()
        terminated = terminated.bool()
        truncated = done & ~terminated if truncated is None else truncated.bool()
        cut = last.reshape(*last.shape, *(1,) * (done.ndim - last.ndim)) & ~terminated
        values = (done | cut, terminated, truncated | cut)
        for name, value in zip(ENDS, values):
            following.set(sibling(key, name), value)


# Minari ------------------------------------------------------------------------------


def _minari() -> Any:
    try:
        import minari
    except ImportError as err:
        raise ImportError(
            "Minari datasets need minari: pip install 'torchrl-wm[minari]'."
        ) from err
    return minari


def _minari_dataset(name: str) -> Any:
    minari = _minari()
    known = minari.list_local_datasets()
    if name not in known:
        raise FileNotFoundError(
            f"There is no Minari dataset {name!r} on this machine; there are {sorted(known)}. "
            f"Nothing is downloaded here: minari download {name} does it."
        )
    return minari.load_dataset(name, download=False)


def _is_minari(source: Any) -> bool:
    return hasattr(source, "iterate_episodes") and hasattr(source, "action_space")


def _minari_episodes(dataset: Any) -> tuple[list[dict[str, Any]], int | None]:
    """The episodes, and the number of actions if they are choices."""
    names = (*NAMES, "truncations")
    episodes = [
        {name: getattr(episode, name) for name in names}
        for episode in dataset.iterate_episodes()
    ]
    number = getattr(dataset.action_space, "n", None)
    return episodes, None if number is None else int(number)


# What an env says of them --------------------------------------------------------------


def _one_hot(actions: torch.Tensor, classes: int) -> torch.Tensor:
    actions = actions.reshape(len(actions)).long()
    if int(actions.min()) < 0 or int(actions.max()) >= classes:
        raise ValueError(
            f"The actions are class numbers from {int(actions.min())} to {int(actions.max())}, and "
            f"the env has {classes} actions, numbered from 0."
        )
    return torch.nn.functional.one_hot(actions, classes)


def _as_specified(data: TensorDictBase, env: EnvBase) -> TensorDictBase:
    """The transitions with the entries that the env has."""
    specs: EnvSpecs = read_specs(env)
    spec_of = env.full_action_spec_unbatched
    for entry in specs.actions:
        value = data.get(entry.key, None)
        is_choice = value is not None and not value.is_floating_point()
        if is_choice and value.shape[1:].numel() == 1 and entry.size > 1:
            data.set(
                entry.key, _one_hot(value, entry.size).to(spec_of[entry.key].dtype)
            )
    entries = [(e.key, e) for e in (*specs.vectors, *specs.pixels, *specs.actions)]
    entries += [(join("next", e.key), e) for e in (*specs.vectors, *specs.pixels)]
    entries.append((join("next", specs.reward.key), specs.reward))
    missing = missing_from(data, [key for key, _ in entries])
    if missing:
        raise MissingEntryError(
            f"The data lacks the env's entries {missing}; it has {leaf_keys(data)}."
        )
    for key, entry in entries:
        value = data.get(key)
        if tuple(value.shape[1:]) != entry.shape:
            raise ValueError(
                f"{key!r} has the shape {tuple(value.shape[1:])} per step in the data, and "
                f"{entry.shape} in the env."
            )
        if value.dtype != entry.dtype and value.is_floating_point():
            data.set(key, value.to(entry.dtype))
    return data
