"""Dictionaries of arrays, and tables, as transitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase

from torchrl_wm.modules.keys import join
from torchrl_wm.trainers.logged_entries import check_names
from torchrl_wm.trainers.logged_episodes import (
    Ends,
    kind_of_ends,
    read_ends,
    row_order,
    Rows,
)
from torchrl_wm.trainers.logged_names import (
    assigned,
    Names,
    renames_of,
    TELL_ENDS,
    unread_note,
)
from torchrl_wm.trainers.logged_numbers import as_tensor, numbers
from torchrl_wm.trainers.logged_rows import Joined, Pick


@dataclass
class Log:
    """The arrays of one log under our names, not yet tensors.

    Attributes:
        what: what it is called in messages.
        arrays: by our name; observations are dictionaries by path below it, ``()`` for an array.
        rows, ends: in which order its rows are, and where they end episodes.
    """

    what: str
    arrays: dict[str, Any]
    rows: Rows
    ends: Ends


@dataclass
class Dropped:
    """What is left out as the observation after it is not recorded."""

    rows: int = 0
    terminations: int = 0
    #: The plain ends that are not left out.
    plain: int = 0

    def note(self) -> str:
        """Return what to say of it."""
        text = (
            f"There are no next_observations, so the last rows of episodes are left out, as the "
            f"observation after them is not recorded: {self.rows} rows"
        )
        if self.terminations:
            text += (
                f", with {self.terminations} terminations, of which a model learns nothing. To keep "
                f"them, record next_observations, or, with the id of its episode in each row "
                f"(episodes), one more row after the end of an episode, with the observation there"
            )
        return text + "."


def is_table(source: Any) -> bool:
    """Return whether a source is a table such as a DataFrame of pandas or polars."""
    return hasattr(source, "columns") and hasattr(source, "__getitem__")


def from_arrays(
    sources: list[Any],
    *,
    names: Names | str | None,
    dones: str | None,
    is_list: bool,
    is_own: bool,
    known: bool,
    notes: list[str],
) -> TensorDictBase:
    """Return the transitions of one or several logs, ``[N]``.

    Args:
        sources: dictionaries of arrays, or tables. The list is emptied, so that what nobody else
            has needs no memory any more once it is read.

    Keyword Args:
        names: see :func:`~torchrl_wm.trainers.logged_names.renames_of`.
        dones: see :func:`~torchrl_wm.trainers.logged_episodes.kind_of_ends`.
        is_list: whether they are episodes, or logs, of a list.
        is_own: whether nobody else has the arrays, so that they need not be copied.
        known: see :func:`~torchrl_wm.trainers.logged_entries.check_names`.
        notes: what to say of the data; it is added to.

    Raises:
        KeyError: if an array is missing; the message names it.
        ValueError: if lengths, shapes or values do not fit.
    """
    renames, unread, logs = renames_of(names), [], []
    for number in range(len(sources)):
        what = f"episode {number}" if is_list else "the data"
        found = _paths(sources[number], what)
        sources[number] = None
        log, left = _read(found, what, renames, is_list, notes)
        logs.append(log)
        unread += left
    if unread:
        notes.append(unread_note(unread))
    said: list[str] = []
    kind = kind_of_ends([log.ends for log in logs], dones, said)
    dropped, joined = Dropped(), Joined(sum(len(log.arrays["rewards"]) for log in logs))
    for number, log in enumerate(logs):
        part = _transitions(log, kind, known, dropped, is_own=is_own)
        logs[number] = None
        if len(logs) == 1:
            joined = part
        else:
            joined.add(part, number)
    if dropped.rows:
        notes.append(dropped.note())
    if dropped.plain or (kind == "terminal" and dropped.terminations):
        notes.extend(said)
    return joined if len(logs) == 1 else joined.transitions()


def _read(
    found: dict[tuple[str, ...], Any],
    what: str,
    renames: Mapping[str, str],
    is_list: bool,
    notes: list[str],
) -> tuple[Log, list[str]]:
    """Return a log under our names, from arrays by path, and the names of what is not read."""
    groups, unread = assigned(list(found), renames, what)
    arrays: dict[str, Any] = {}
    for (name, *rest), paths in groups.items():
        value = _side_by_side("/".join((name, *rest)), found, paths, what)
        if name.endswith("observations"):
            if len(paths) > 1 and not value.is_floating_point():
                value = value.double()  # numbers that happen to be whole, in columns
            arrays.setdefault(name, {})[tuple(rest)] = value
        elif rest:
            raise ValueError(
                f"{name} of {what} must be an array, and has the entry {'/'.join(rest)!r}."
            )
        else:
            arrays[name] = value
    arrays["rewards"] = numbers("rewards", arrays["rewards"], what).float()
    steps = len(arrays["rewards"])
    if not steps:
        raise ValueError(f"{what} has no step.")
    rows = row_order(arrays, what, notes)
    ends = read_ends(arrays, steps, rows, what, notes, is_episode=is_list)
    for name in TELL_ENDS:
        arrays.pop(name, None)
    return Log(what, arrays, rows, ends), unread


def _paths(source: Any, what: str) -> dict[tuple[str, ...], Any]:
    """Return arrays by path; slashes in the names of a dictionary divide them."""
    if isinstance(source, Mapping):
        out: dict[tuple[str, ...], Any] = {}
        for name, value in source.items():
            _flatten(tuple(str(name).split("/")), value, out)
        return out
    if not is_table(source):
        raise ValueError(
            f"{what} must be a dictionary of arrays, or a table such as a DataFrame, got "
            f"{type(source).__name__}."
        )
    columns = list(source.columns)
    twice = sorted({str(name) for name in columns if columns.count(name) > 1})
    if twice:
        raise ValueError(f"The table {what} has several columns {twice}: rename them.")
    out = {}
    for name in columns:
        path = str(name).split("/")
        if isinstance(name, tuple):  # levels, of which the lower ones may be empty
            path = [str(part) for part in name if part != ""]
        out[tuple(path)] = source[name]
    return out


def _flatten(path: tuple[str, ...], value: Any, out: dict) -> None:
    """Add an array, or those of a dictionary, by path."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            _flatten((*path, str(name)), item, out)
    else:
        out[path] = value


def _side_by_side(
    name: str, found: dict[tuple, Any], paths: Sequence[tuple], what: str
) -> Any:
    """Return an array, or one vector of several arrays, which are taken out of ``found``."""
    if len(paths) == 1:
        return found.pop(paths[0])
    parts = []
    for path in paths:
        part = as_tensor(f"{'/'.join(path)} of {what}", found.pop(path))
        if part.ndim not in (1, 2):
            raise ValueError(
                f"{'/'.join(path)} of {what} is one of several that make {name}, and must be "
                f"[N] or [N, k], got {tuple(part.shape)}."
            )
        if parts and len(part) != len(parts[0]):
            raise ValueError(
                f"{'/'.join(path)} of {what} has {len(part)} rows, and "
                f"{'/'.join(paths[0])} has {len(parts[0])}."
            )
        parts.append(part if part.ndim == 2 else part.unsqueeze(-1))
    return torch.cat(parts, -1)  # in the dtype that holds all


# Transitions ----------------------------------------------------------------------------


def _transitions(
    log: Log, kind: str | None, known: bool, dropped: Dropped, *, is_own: bool
) -> TensorDictBase:
    """Return the transitions of one log.

    Args:
        log: the log, whose arrays are taken out of it.
        kind: what plain ends are.
        known: see :func:`check_names`.
        dropped: counts what is left out.

    Keyword Args:
        is_own: whether nobody else has the arrays.
    """
    arrays, what, ends = log.arrays, log.what, log.ends.decided(kind or "timeout")
    steps, order = len(arrays["rewards"]), log.rows.order
    observations = _tree("observations", arrays.pop("observations"), what)
    check_names(observations, what, known)
    keep, cut = None, ends.last & ~ends.terminated
    following: dict[Any, torch.Tensor] | None = None
    if "next_observations" in arrays:
        following = _tree("next_observations", arrays.pop("next_observations"), what)
    elif all(len(value) == steps + 1 for value in observations.values()):
        observations, following = _successive(observations, log, what)
        if is_own:  # not the same memory twice
            following = {key: value.clone() for key, value in following.items()}
    else:
        keep, cut = _kept(ends, what)
        lost = ~keep & ~ends.final
        dropped.rows += int(lost.sum())
        dropped.terminations += int((lost & ends.terminated).sum())
    dropped.plain += int(
        (log.ends.plain if keep is None else log.ends.plain & keep).sum()
    )
    pick = Pick(keep, order, is_own)
    out = TensorDict({}, batch_size=[steps if keep is None else int(keep.sum())])
    for name in ("actions", "rewards"):
        value = as_tensor(f"{name} of {what}", arrays.pop(name))
        _check_length(name, value, what, steps, steps)
        out.set(name.removesuffix("s"), pick(value))
    if following is None:
        _check_lengths(observations, what, steps)
        _set_observations(out, observations, observations, pick, 1)
    else:
        _check_alike(observations, following, what, steps)
        _set_observations(out, observations, following, pick, 0)
    out.set(("next", "reward"), out.pop("reward"))
    terminated, truncated = ends.terminated, ends.truncated | cut
    for name, value in (
        ("terminated", terminated),
        ("truncated", truncated),
        ("done", terminated | truncated),
    ):
        out.set(("next", name), pick.of_ordered(value).unsqueeze(-1))
    return out


def _kept(ends: Ends, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows after which the next row has their next observation, and where they are cut off."""
    keep = ~ends.last
    keep[:-1] |= ends.final[1:]
    if not keep.any():
        raise ValueError(
            f"No transition remains of {what}: there are no next_observations, and all of its "
            f"{int(ends.last.sum())} episodes have a single row. Give next_observations [N, ...], or "
            f"what tells which rows are of one episode."
        )
    cut = keep & ~ends.ended
    cut[:-1] &= ~keep[1:]
    return keep, cut


def _successive(
    observations: dict[Any, torch.Tensor], log: Log, what: str
) -> tuple[dict[Any, torch.Tensor], dict[Any, torch.Tensor]]:
    """Return the observations of one episode before and after each step, from ``[N + 1, *O]``."""
    inner = log.ends.last[:-1]
    if inner.any() or log.rows.order is not None:
        raise ValueError(
            f"{what} has no next_observations, one observation more than steps, and ends at step "
            f"{int(inner.float().argmax())} of {len(inner) + 1}: it is no single episode, and the "
            f"observation after that step is not there. Give next_observations [N, ...], or a list "
            f"of episodes, each with one observation more than steps."
        )
    before = {key: value[:-1] for key, value in observations.items()}
    return before, {key: value[1:] for key, value in observations.items()}


def _check_lengths(values: Mapping[Any, torch.Tensor], what: str, steps: int) -> None:
    for value in values.values():
        _check_length("observations", value, what, steps, steps)


def _check_alike(
    observations: Mapping[Any, torch.Tensor],
    following: Mapping[Any, torch.Tensor],
    what: str,
    steps: int,
) -> None:
    """Refuse next observations of other lengths or shapes than the observations."""
    for value in following.values():
        _check_length("next_observations", value, what, steps, steps)
    _check_lengths(observations, what, steps)
    shapes, then = (
        {key: tuple(value.shape[1:]) for key, value in values.items()}
        for values in (observations, following)
    )
    if shapes != then:
        raise ValueError(
            f"next_observations of {what} do not have the entries and shapes of observations: "
            f"{then} per step, and {shapes}."
        )


def _set_observations(
    out: TensorDictBase,
    observations: dict[Any, torch.Tensor],
    following: dict[Any, torch.Tensor],
    pick: Pick,
    shift: int,
) -> None:
    """Write observations and those that follow, ``shift`` rows later, into transitions."""
    for key in list(observations):
        # Whole numbers before a step, such as zeros, and others after it.
        kind = torch.promote_types(observations[key].dtype, following[key].dtype)
        out.set(join("next", key), pick(following[key], shift).to(kind))
        out.set(key, pick(observations[key]).to(kind))  # last, as it may overwrite them


def _check_length(
    name: str, value: torch.Tensor, what: str, steps: int, length: int
) -> None:
    if value.ndim < 1 or len(value) != length:
        raise ValueError(
            f"{name} of {what} has {len(value) if value.ndim else 0} rows, and there are {steps} "
            f"rewards, so {length} were expected. Without next_observations one episode may have "
            f"one observation more than rewards."
        )


def _tree(
    name: str, entries: dict[tuple[str, ...], Any], what: str
) -> dict[Any, torch.Tensor]:
    """Return an array, or the leaves of a dictionary of arrays, by key."""
    out = {}
    for path, value in entries.items():
        key = path[0] if len(path) == 1 else path or "observation"
        tensor = as_tensor("/".join((name, *path)) + f" of {what}", value)
        # Discrete observations, or one number each.
        out[key] = tensor.unsqueeze(-1) if tensor.ndim == 1 else tensor
    return out
