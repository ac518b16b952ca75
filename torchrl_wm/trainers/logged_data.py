"""Recorded transitions: arrays, replay buffers, tensordicts, Minari datasets."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Union

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.data import ReplayBuffer, TensorSpec
from torchrl.envs import EnvBase

from torchrl_wm import _upstream
from torchrl_wm.models import EnvSpecs, read_specs
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import (
    as_tuple,
    join,
    leaf_keys,
    missing_from,
    sibling,
    unique,
)
from torchrl_wm.modules.world_model.filtering import episode_begins
from torchrl_wm.trainers.logged_actions import (
    action_keys,
    as_choices,
    as_spec,
    bounded_specs,
    by_key,
    check_one_source,
    start_of,
)
from torchrl_wm.trainers.logged_bounds import ActionBounds
from torchrl_wm.trainers.logged_entries import (
    check_names,
    check_observed_actions,
    ENDS,
    narrowed,
)
from torchrl_wm.trainers.logged_files import oldest_first, read
from torchrl_wm.trainers.logged_minari import is_minari, minari_episodes, of_space

#: The sources that :func:`load_transitions` reads.
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


def load_transitions(
    source: DataSource,
    *,
    env: EnvBase | None = None,
    action_spec: TensorSpec | None = None,
    action_bounds: ActionBounds | None = None,
) -> TensorDictBase:
    """Read recorded transitions.

    Args:
        source: one of

            - a dictionary of arrays of ``N`` steps: ``observations`` ``[N, *O]``, ``actions``
              ``[N, *A]``, ``rewards`` ``[N]``, ``terminations`` ``[N]``,
              ``next_observations`` ``[N, *O]`` and, optionally, ``truncations`` ``[N]``;
            - such a dictionary without ``next_observations`` and with ``observations``
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
            their names are joined by slashes, ``observations/position``. Names that have
            another meaning in a transition (``action``, ``reward``, ``done``, ...) are
            refused.

    Keyword Args:
        env: the env that was recorded, whose specs the transitions will have. Choices in the
            data are class numbers or one-hot, and take the form of the env; arrays number them
            as its Gymnasium space does, from its ``start`` on.
        action_spec: the spec of only the actions, without batch dims, in place of the env.
            Without either, integers in arrays are choices, which become one-hot as in
            ``GymEnv``: one number for each step is one choice, among as many options as the
            greatest number plus one; a vector of numbers is several choices (rows of 0 and 1
            stay as they are). A Minari dataset says how many options there are, and whether
            integers are quantities, which become floats.
        action_bounds: ``(low, high)``, numbers or one for each dim, in place of both: the actions
            are quantities between these bounds, integers too, which become floats. Without it
            the bounds are read off the data, see :class:`RecordedEnv`.

    Returns:
        Transitions ``[N]``, in the order of recording: the observations (an array under
        ``"observation"``, dictionaries under their own keys), ``"action"``, and below
        ``"next"`` the observations, ``"reward"``, ``"terminated"``, ``"truncated"`` and
        ``"done"``, each ``[N, 1]``. Float64 becomes float32, unless it is float64 in ``env`` or,
        without ``env``, float32 is too coarse for the values, such as seconds since 1970. If
        ``env`` has such an entry in float32, a warning names it. Entries of tensordicts keep
        their keys.

        If a row, a dictionary or a buffer ends before its episode does, its last step is
        truncated, as nothing follows it. So is a step before one that begins an episode
        (``is_init``) or belongs to another (``("collector", "traj_ids")``). Full buffers are
        read from their oldest step on.

    Raises:
        FileNotFoundError: if there is no such file, folder or dataset.
        KeyError: if an array or entry is missing; the message names it.
        ValueError: if lengths or shapes do not fit, an observation has a reserved name, or the
            source is of another kind.

    .. note:: The folders of tensordicts may hold pickled objects, which run code when they are
       loaded. Load only folders that you trust.

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
    return read_transitions(source, env, action_spec, action_bounds)[0]


def read_transitions(
    source: DataSource,
    env: EnvBase | None = None,
    action_spec: TensorSpec | None = None,
    action_bounds: ActionBounds | None = None,
) -> tuple[TensorDictBase, TensorSpec | None]:
    """Return what :func:`load_transitions` does, and the spec of the actions if the source gives one."""
    check_one_source(env=env, action_spec=action_spec, action_bounds=action_bounds)
    space = None
    if isinstance(source, (str, os.PathLike)):
        source = read(source)
    if isinstance(source, ReplayBuffer):
        source = _content(source)
    if is_minari(source):
        source, space = minari_episodes(source)
    is_arrays = not isinstance(source, TensorDictBase)
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
    if env is None:  # an env's specs say what an entry is
        check_observed_actions(data)
    data = narrowed(data, env)
    if action_bounds is not None:
        action_spec = bounded_specs(data, action_bounds)
    elif space is not None:
        actions, spec = of_space("action", data.get("action"), space)
        data.set("action", actions)
        action_spec = spec if env is None and action_spec is None else action_spec
    elif is_arrays and env is None and action_spec is None:
        data.set("action", as_choices("action", data.get("action")))
    if env is not None:
        start = start_of(env) if is_arrays and space is None else 0
        return _as_specified(data, env, start), None
    if action_spec is not None:
        keys = ["action"] if is_arrays else action_keys(data)
        for key, spec in by_key(action_spec, keys).items():
            data.set(key, as_spec(key, data.get(key), spec, "action_spec"))
    return data, action_spec


# Arrays --------------------------------------------------------------------------


def _from_arrays(
    arrays: Mapping[str, Any], what: str, known: bool = False
) -> TensorDictBase:
    """Return the transitions of one dictionary, ``[N]``; ``known``: see :func:`check_names`."""
    _check_array_names(arrays, what)
    rewards = _numbers("rewards", arrays["rewards"], what).float()
    steps = len(rewards)
    if not steps:
        raise ValueError(f"{what} has no step.")
    terminated = _ends("terminations", arrays["terminations"], what)
    truncated = torch.zeros(steps, 1, dtype=torch.bool)
    if "truncations" in arrays:
        truncated = _ends("truncations", arrays["truncations"], what)
    actions = _tensor("actions", arrays["actions"])
    for name, value in (
        ("actions", actions),
        ("terminations", terminated),
        ("truncations", truncated),
    ):
        _check_length(name, value, what, steps, steps)
    observations = _tree("observations", arrays["observations"])
    check_names(observations, what, known)
    if "next_observations" in arrays:
        following = _tree("next_observations", arrays["next_observations"])
    else:
        ended = terminated | truncated
        observations, following = _successive(observations, ended, what)
    # The data has nothing after the last step.
    truncated[-1] |= ~terminated[-1]
    out = TensorDict({"action": actions}, batch_size=[steps])
    _set_observations(out, observations, following, what)
    for name, value in (
        ("reward", rewards),
        ("terminated", terminated),
        ("truncated", truncated),
        ("done", terminated | truncated),
    ):
        out.set(("next", name), value)
    return out


def _check_array_names(arrays: Mapping[str, Any], what: str) -> None:
    """Refuse anything but a dictionary of the required arrays."""
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
            + f"{list(NAMES)} are required, {list(OPTIONAL)} are optional."
        )


def _successive(
    observations: dict[Any, torch.Tensor], ended: torch.Tensor, what: str
) -> tuple[dict[Any, torch.Tensor], dict[Any, torch.Tensor]]:
    """Return the observations of one episode before and after each step, from ``[N + 1, *O]``."""
    steps = len(ended)
    if ended[:-1].any():
        raise ValueError(
            f"{what} has no next_observations and ends at step "
            f"{int(ended[:-1].float().argmax())} of {steps}: the observation after that step "
            f"is not there. Give next_observations [N, ...], or a list of episodes, each with "
            f"one observation more than steps."
        )
    for value in observations.values():
        _check_length("observations", value, what, steps, steps + 1)
    before = {key: value[:-1] for key, value in observations.items()}
    return before, {key: value[1:] for key, value in observations.items()}


def _set_observations(
    out: TensorDictBase,
    observations: dict[Any, torch.Tensor],
    following: dict[Any, torch.Tensor],
    what: str,
) -> None:
    """Write observations and those that follow into transitions ``[N]``."""
    steps = len(out)
    for name, values in (
        ("next_observations", following),
        ("observations", observations),
    ):
        for value in values.values():
            _check_length(name, value, what, steps, steps)
    for key, value in observations.items():
        if key not in following or following[key].shape != value.shape:
            raise ValueError(
                f"next_observations of {what} do not have the shapes of observations: {key!r} is "
                f"{tuple(value.shape)}, and then "
                f"{tuple(following[key].shape) if key in following else 'missing'}."
            )
        out.set(key, value)
        out.set(join("next", key), following[key])


def _check_length(
    name: str, value: torch.Tensor, what: str, steps: int, length: int
) -> None:
    if len(value) != length:
        raise ValueError(
            f"{name} of {what} has {len(value)} rows, and there are {steps} rewards, so "
            f"{length} were expected. Without next_observations an episode has one "
            f"observation more than rewards."
        )


def _numbers(name: str, value: Any, what: str) -> torch.Tensor:
    """Return one number for each step, ``[N, 1]``."""
    tensor = _tensor(name, value)
    if tensor.ndim not in (1, 2) or (tensor.ndim == 2 and tensor.shape[1] != 1):
        raise ValueError(
            f"{name} of {what} must be one number for each step, [N], got "
            f"{tuple(tensor.shape)}. Several episodes are a list of dictionaries."
        )
    return tensor.reshape(-1, 1)


def _ends(name: str, value: Any, what: str) -> torch.Tensor:
    """Return the steps at which the episode ends, ``[N, 1]`` bool."""
    return _flags(f"{name} of {what}", _numbers(name, value, what))


def _flags(name: str, value: torch.Tensor) -> torch.Tensor:
    """Return 0 and 1 of any dtype as bool; refuse other values, NaN included."""
    wrong = ~((value == 0) | (value == 1))
    if wrong.any():
        step = wrong.flatten(1) if wrong.ndim > 1 else wrong.unsqueeze(-1)
        raise ValueError(
            f"{name} must be 0 or 1, and are {value[wrong][0].item()} in {int(wrong.sum())} of "
            f"{wrong.numel()} places, first in row "
            f"{int(step.any(-1).long().argmax())}. Leave those episodes out, or repair them."
        )
    return value.bool()


def _tree(name: str, value: Any, key: tuple = ()) -> dict[Any, torch.Tensor]:
    """Return an array, or the leaves of a dictionary of arrays, by key."""
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


# TorchRL's forms ---------------------------------------------------------------------


def _content(buffer: ReplayBuffer) -> Any:
    """Return all that a replay buffer holds, ``[*B, T]``, from its oldest step on."""
    if not len(buffer):
        raise ValueError("The data holds no transition: the replay buffer is empty.")
    data = buffer[:]
    cursor = _upstream.cursor(buffer.writer)
    if not isinstance(data, TensorDictBase) or cursor is None:
        return data
    time = buffer.dim_extend
    data = oldest_first(data, time, cursor)
    last = getattr(buffer.storage, "ndim", 1) - 1
    return data if time >= last else data.transpose(time, last)


def _flat(data: TensorDictBase) -> TensorDictBase:
    """Return the transitions ``[N]`` of a tensordict ``[*B, T]``, without padding."""
    found = {as_tuple(key)[-1] for key in leaf_keys(data) if key[0] == "next"}
    missing = [] if "reward" in found else [("next", "reward")]
    if not found & {*ENDS}:
        missing.append(("next", "done"))
    if missing:
        raise MissingEntryError(
            f"The tensordict lacks {missing}; it has {leaf_keys(data)}. Observations and "
            f"actions are required, and below 'next' observations, rewards and dones, as in rollouts."
        )
    if not data.batch_size.numel():
        raise ValueError("The data holds no transition.")
    data = data.copy() if data.batch_dims else data.reshape(1)
    valid = data.get(("collector", "mask"), None)
    if valid is None:
        valid = torch.ones(data.batch_size, dtype=torch.bool, device=data.device)
    valid = valid.reshape(data.batch_size)
    _end(data, _last_steps(data, valid), valid)
    return data.reshape(-1)[valid.reshape(-1)].clone()


def _last_steps(data: TensorDictBase, valid: torch.Tensor) -> torch.Tensor:
    """Return the steps after which nothing of their episode was recorded, ``[*B, T]`` bool."""
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


def _end(data: TensorDictBase, last: torch.Tensor, valid: torch.Tensor) -> None:
    """Truncate the steps ``last``, ``[*B]``, that do not terminate."""
    following = data.get("next")

    def read(key: NestedKey) -> torch.Tensor | None:
        value = following.get(key, None)
        if value is None:
            return None
        _flags(repr(join("next", key)), value[valid])  # padding may be anything
        return value.bool()

    ends = [key for key in leaf_keys(following) if as_tuple(key)[-1] in ENDS]
    for key in unique(sibling(key, "done") for key in ends):
        done, terminated, truncated = (read(sibling(key, name)) for name in ENDS)
        if done is None:
            done = terminated if truncated is None else truncated
            if terminated is not None:
                done = done | terminated
        if terminated is None:
            terminated = done if truncated is None else done & ~truncated
        if truncated is None:
            truncated = done & ~terminated
        cut = last.reshape(*last.shape, *(1,) * (done.ndim - last.ndim)) & ~terminated
        values = (done | cut, terminated, truncated | cut)
        for name, value in zip(ENDS, values):
            following.set(sibling(key, name), value)


# The form of an env -------------------------------------------------------------------


def _as_specified(data: TensorDictBase, env: EnvBase, start: Any) -> TensorDictBase:
    """Return the transitions with the entries of the env, in its shapes and dtypes."""
    specs: EnvSpecs = read_specs(env)
    entries = [(e.key, e) for e in (*specs.vectors, *specs.pixels)]
    entries += [(join("next", e.key), e) for e in (*specs.vectors, *specs.pixels)]
    entries.append((join("next", specs.reward.key), specs.reward))
    missing = missing_from(data, [*specs.action_keys, *(key for key, _ in entries)])
    if missing:
        raise MissingEntryError(
            f"The data lacks the env's entries {missing}; it has {leaf_keys(data)}."
        )
    for key in specs.action_keys:
        spec = env.full_action_spec_unbatched[key]
        data.set(key, as_spec(key, data.get(key), spec, "the env", start=start))
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
