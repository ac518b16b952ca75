"""Recorded transitions: arrays, tables, replay buffers, tensordicts, Minari datasets."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Union

from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer, TensorSpec
from torchrl.envs import EnvBase

from torchrl_wm.trainers.logged_actions import (
    action_keys,
    as_choices,
    as_spec,
    bounded_specs,
    by_key,
    check_one_source,
    start_of,
)
from torchrl_wm.trainers.logged_arrays import from_arrays, is_table
from torchrl_wm.trainers.logged_bounds import ActionBounds
from torchrl_wm.trainers.logged_entries import check_observed_actions, narrowed
from torchrl_wm.trainers.logged_files import read
from torchrl_wm.trainers.logged_minari import is_minari, minari_episodes, of_space
from torchrl_wm.trainers.logged_names import Names
from torchrl_wm.trainers.logged_tensordicts import as_specified, content, flat

#: The sources that :func:`load_transitions` reads; Any stands for tables, such as DataFrames.
DataSource = Union[
    str,
    os.PathLike,
    TensorDictBase,
    ReplayBuffer,
    Mapping[str, Any],
    Sequence[Any],
    Any,
]


def load_transitions(
    source: DataSource,
    *,
    env: EnvBase | None = None,
    action_spec: TensorSpec | None = None,
    action_bounds: ActionBounds | None = None,
    names: Names | str | None = None,
    dones: str | None = None,
) -> TensorDictBase:
    """Read recorded transitions.

    Args:
        source: one of

            - a dictionary of arrays of ``N`` steps: ``observations`` ``[N, *O]``, ``actions``
              ``[N, *A]``, ``rewards`` ``[N]``, what tells where episodes end, and, optionally,
              ``next_observations`` ``[N, *O]``;
            - such a dictionary with ``observations`` ``[N + 1, *O]``: the arrays of one episode,
              its last observation included;
            - a table, such as a DataFrame of pandas or polars, with columns ``obs_0``, ``obs_1``,
              ..., ``action_0``, ..., ``reward``, ...;
            - a file ``.npz`` or ``.hdf5`` with the arrays of one dictionary (for HDF5 with h5py), or
              a table ``.csv`` or ``.tsv``, whose first line names the columns;
            - a list of dictionaries, tables or files, each an episode or several, or the pattern
              of files, ``"logs/*.csv"``;
            - a replay buffer of TorchRL, or the folder that ``buffer.dumps(folder)`` wrote;
            - a tensordict ``[*B, T]`` of TorchRL's form (``observation``, ``action``,
              ``("next", "observation")``, ``("next", "reward")``, ``("next", "terminated")``,
              ...), or the folder that ``tensordict.memmap(folder)`` wrote;
            - ``"minari:<id>"``, a Minari dataset on this machine, the folder of one, or a
              ``minari.MinariDataset``. Nothing is downloaded.

            What tells where episodes end is one or several of ``terminations`` (for good),
            ``truncations`` (cut off), ``dones`` (either), each ``[N]`` of 0 and 1; ``episodes``,
            the id of each row's episode; and ``steps``, the number of the row in it. By the latter
            two, rows of an episode that are apart or not in order are put in order.

            Without ``next_observations`` the last row of each episode is left out, as the
            observation after it is not recorded, and a warning counts them. A row more after the
            end of an episode, of the same id, has only its observation read.

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
        names: what arrays or columns are called in the data: ``{"observations": "state",
            "actions": ["throttle", "brake"]}``, our name first; several make one vector. The text
            ``"state=observations,throttle=actions"``, the name in the data first, is read as well.
            Common names (``obs``, ``next_obs``, ``done``, singular forms, D4RL's ``terminals`` and
            ``timeouts``) are known. What is not read is named in a warning.
        dones: what ends are if the data does not tell it: ``"terminal"``, ends for good, or
            ``"timeout"``, cut off. By default, and with a warning that says so, they are cut off if
            all such episodes are equally long, and terminal otherwise.

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
        ValueError: if there are values that are no numbers, arrays contradict each other, lengths or shapes do not fit, an observation has a reserved name, or the
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
        >>> table = {
        ...     "x": np.arange(4.0),
        ...     "v": np.ones(4),
        ...     "action": np.array([0, 1, 1, 0]),
        ...     "reward": np.zeros(4),
        ...     "terminated": np.array([0, 0, 0, 1]),
        ...     "next_x": np.arange(1.0, 5.0),
        ...     "next_v": np.ones(4),
        ... }
        >>> load_transitions(table, names={"observations": ["x", "v"]})["next", "observation"]
        tensor([[1., 1.],
                [2., 1.],
                [3., 1.],
                [4., 1.]])
    """
    return read_transitions(
        source,
        env=env,
        action_spec=action_spec,
        action_bounds=action_bounds,
        names=names,
        dones=dones,
        stacklevel=2,
    )[0]


def read_transitions(
    source: DataSource,
    *,
    env: EnvBase | None = None,
    action_spec: TensorSpec | None = None,
    action_bounds: ActionBounds | None = None,
    names: Names | str | None = None,
    dones: str | None = None,
    stacklevel: int = 1,
) -> tuple[TensorDictBase, TensorSpec | None]:
    """Return what :func:`load_transitions` does, and the spec of the actions if the source or an argument gives one.

    ``stacklevel`` is whose line warnings name, 1 for that of the caller.
    """
    check_one_source(env=env, action_spec=action_spec, action_bounds=action_bounds)
    logs, is_list, space = _logs(source)
    is_own = isinstance(source, (str, os.PathLike)) or space is not None
    del source  # what nobody else has needs no memory once it is read
    is_arrays, notes = isinstance(logs, list), []
    if is_arrays:
        data = from_arrays(
            logs,
            names=names,
            dones=dones,
            is_list=is_list,
            is_own=is_own,
            known=env is not None,
            notes=notes,
        )
    elif names is not None:
        raise ValueError(
            "names maps the names of arrays and columns. Rename the keys of a tensordict itself, "
            "data.rename_key_(old, new), or those of the env, torchrl.envs.RenameTransform."
        )
    else:
        data = flat(logs, dones, notes)
    del logs
    if not len(data):
        raise ValueError("The data holds no transition.")
    for note in notes:
        warnings.warn(note, UserWarning, stacklevel=1 + stacklevel)
    if env is None:  # an env's specs say what an entry is
        check_observed_actions(data)
    data = narrowed(data, env)
    return _with_actions(data, is_arrays, space, env, action_spec, action_bounds)


def _with_actions(
    data: TensorDictBase,
    is_arrays: bool,
    space: Any,
    env: EnvBase | None,
    action_spec: TensorSpec | None,
    action_bounds: ActionBounds | None,
) -> tuple[TensorDictBase, TensorSpec | None]:
    """Return the transitions with actions in the form of what says what they are, and their spec."""
    is_column = is_arrays and data.get("action").ndim == 1
    if is_column and env is None and action_spec is None and space is None:
        actions = data.get("action")
        if actions.is_floating_point() or action_bounds is not None:
            data.set("action", actions.unsqueeze(-1))  # policies act with vectors
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
        return as_specified(data, env, start), None
    if action_spec is not None:
        keys = ["action"] if is_arrays else action_keys(data)
        for key, spec in by_key(action_spec, keys).items():
            data.set(key, as_spec(key, data.get(key), spec, "action_spec"))
    return data, action_spec


def _logs(source: DataSource) -> tuple[TensorDictBase | list[Any], bool, Any]:
    """Return a tensordict, or the arrays or tables of a source; whether it is a list; and the actions' space."""
    if isinstance(source, (str, os.PathLike)):
        source = read(source)
    if isinstance(source, ReplayBuffer):
        source = content(source)
    if is_minari(source):
        episodes, space = minari_episodes(source)
        return episodes, True, space
    if isinstance(source, TensorDictBase):
        return source, False, None
    if isinstance(source, Mapping) or is_table(source):
        return [source], False, None
    if not isinstance(source, Sequence) or not source:
        raise ValueError(
            f"There is nothing to read: expected arrays, a table, a replay buffer, a tensordict or a "
            f"Minari dataset, got {type(source).__name__}."
        )
    files = [isinstance(item, (str, os.PathLike)) for item in source]
    logs = [read(item) if is_file else item for item, is_file in zip(source, files)]
    for number, log in enumerate(logs):
        is_log = isinstance(log, Mapping) or is_table(log)
        if isinstance(log, TensorDictBase) or not is_log:  # which is a Mapping, too
            raise ValueError(
                f"The data is a list, and its item {number} is {type(log).__name__}: only "
                f"dictionaries of arrays, tables and their files are read one after the other. "
                f"Load the others each by itself, and join them: torch.cat([data, other])."
            )
    return logs, True, None
