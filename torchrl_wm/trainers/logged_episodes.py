"""Where the episodes of logged arrays begin and end, in which order their rows are, and why they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.trainers.logged_names import TELL_ENDS
from torchrl_wm.trainers.logged_numbers import flags, numbers

#: What plain ends, which do not say why, may be.
KINDS = ("terminal", "timeout")


@dataclass(frozen=True)
class Ends:
    """Where the rows of one log end an episode, ``[N]`` bool each.

    Attributes:
        terminated: the episode ended for good.
        truncated: it was cut off.
        plain: it ended, and nothing says which of both.
        last: nothing of the episode follows in the log.
        final: the row after an end that has only the observation there.
        is_assumed: whether the last plain end is one only as the log ends there.
    """

    terminated: torch.Tensor
    truncated: torch.Tensor
    plain: torch.Tensor
    last: torch.Tensor
    final: torch.Tensor
    is_assumed: bool = False

    @property
    def ended(self) -> torch.Tensor:
        """The rows that end an episode, for any reason."""
        return self.terminated | self.truncated | self.plain

    def decided(self, kind: str) -> Ends:
        """Return them with a reason for the plain ones."""
        none = torch.zeros_like(self.plain)
        if kind == "terminal":
            return replace(self, terminated=self.terminated | self.plain, plain=none)
        return replace(self, truncated=self.truncated | self.plain, plain=none)


@dataclass(frozen=True)
class Rows:
    """How the rows of one log follow one another.

    Attributes:
        order: the order ``[N]`` in which they are to be read; None if it is that of the log.
        last: the last rows of episodes in this order, ``[N]`` bool; None if nothing tells them.
        gaps: the rows after which others are missing, ``[N]`` bool; None if nothing tells them.
    """

    order: torch.Tensor | None = None
    last: torch.Tensor | None = None
    gaps: torch.Tensor | None = None


# Rows in their order ------------------------------------------------------------------


def row_order(arrays: dict[str, Any], what: str, notes: list[str]) -> Rows:
    """Return how the rows of episodes follow one another.

    Args:
        arrays: those of one log; ``episodes`` ``[N]`` of any kind, and ``steps`` ``[N]``.
        what: what has them, for messages.
        notes: what to say of the log; it is added to.

    Raises:
        ValueError: if an episode has a step twice, or steps tell no order.
    """
    steps = None
    if "steps" in arrays:
        steps = numbers("steps", arrays["steps"], what).flatten().numpy()
        if not np.isfinite(steps).all():
            row = int(np.argmin(np.isfinite(steps)))
            raise ValueError(f"steps of {what} is {steps[row]} in row {row}.")
    if "episodes" not in arrays:
        if steps is None:
            return Rows()
        last = _resets(steps, what)
        return Rows(
            None, *map(torch.from_numpy, (last, _gaps(steps, last, what, notes)))
        )
    codes, ids = _codes(arrays["episodes"], what)
    if steps is not None and len(steps) != len(codes):
        raise ValueError(
            f"steps of {what} has {len(steps)} rows, episodes {len(codes)}."
        )
    order = None
    if (np.diff(codes) < 0).any():
        order = np.argsort(codes, kind="stable")
        notes.append(
            f"The rows of some of the {len(ids)} episodes of {what} are not next to each other: "
            f"each episode was put together, with its rows in the order of the log."
        )
    if steps is not None:
        order = _by_steps(codes, steps, order, ids, what, notes)
    codes = codes if order is None else codes[order]
    last, gaps = np.append(codes[1:] != codes[:-1], True), None
    if steps is not None:
        steps = steps if order is None else steps[order]
        gaps = torch.from_numpy(_gaps(steps, last, what, notes))
    order = None if order is None else torch.from_numpy(order)
    return Rows(order, torch.from_numpy(last), gaps)


def _codes(value: Any, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of each row's episode, in the order in which they come, and the ids."""
    ids = np.asarray(value)
    if ids.ndim == 2 and ids.shape[1] == 1:
        ids = ids[:, 0]
    missing = ids != ids  # NaN
    if ids.dtype.kind == "O":
        missing = np.array([one is None or one != one for one in ids.tolist()])
        ids = np.array([str(one) for one in ids.tolist()])
    if ids.ndim != 1 or np.any(missing):
        raise ValueError(
            f"episodes of {what} must be one id for each row, [N], got "
            + (
                f"none in row {int(np.argmax(missing))}."
                if ids.ndim == 1
                else f"the shape {ids.shape}."
            )
        )
    if not len(ids):
        raise ValueError(f"{what} has no step.")
    changes = np.flatnonzero(ids[1:] != ids[:-1]) + 1
    heads = ids[np.append(0, changes)]  # far fewer than rows, most often
    unique, first, inverse = np.unique(heads, return_index=True, return_inverse=True)
    rank = np.empty(len(unique), np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(unique))
    lengths = np.diff(np.concatenate([[0], changes, [len(ids)]]))
    return np.repeat(rank[inverse.reshape(-1)], lengths), unique[np.argsort(first)]


def _by_steps(
    codes: np.ndarray,
    steps: np.ndarray,
    order: np.ndarray | None,
    ids: np.ndarray,
    what: str,
    notes: list[str],
) -> np.ndarray | None:
    """Return the order in which steps ascend within each episode; see :func:`row_order`."""
    now, at = (codes, steps) if order is None else (codes[order], steps[order])
    same = now[1:] == now[:-1]
    if not (same & (at[1:] <= at[:-1])).any():
        return order
    order = np.lexsort((steps, codes))
    now, at = codes[order], steps[order]
    twice = (now[1:] == now[:-1]) & (at[1:] == at[:-1])
    if twice.any():
        place = int(np.argmax(twice))
        rows = sorted(order[place : place + 2].tolist())
        raise ValueError(
            f"The episode {ids[now[place]].item()!r} of {what} has the step {at[place].item():g} "
            f"twice, in the rows {rows[0]} and {rows[1]}: give each episode an id of its own, or "
            f"leave one of the rows out."
        )
    notes.append(
        f"The steps of some of the {len(ids)} episodes of {what} do not ascend: each episode was "
        f"sorted by them."
    )
    return order


def _resets(steps: np.ndarray, what: str) -> np.ndarray:
    """Return the rows before those at which steps begin anew, ``[N]`` bool."""
    back = steps[1:] <= steps[:-1]
    begins = steps[1:][back]
    if len(begins) and (begins != begins.min()).any():
        row = 1 + int(np.flatnonzero(back)[np.argmax(begins != begins.min())])
        raise ValueError(
            f"The steps of {what} go back to {steps[row]:g} in row {row}, and elsewhere to "
            f"{begins.min():g}: its rows are not in order, or mixed up with those of other "
            f"episodes. Give each row the id of its episode as well, episodes."
        )
    return np.append(back, True)


def _gaps(
    steps: np.ndarray, last: np.ndarray, what: str, notes: list[str]
) -> np.ndarray:
    """Return the rows after which rows are missing, ``[N]`` bool, if steps are whole numbers."""
    gaps = np.zeros_like(last)
    jumps = np.diff(steps)[~last[:-1]]
    if not len(jumps) or (jumps % 1 != 0).any():  # times, which need not be even
        return gaps
    values, counts = np.unique(jumps, return_counts=True)
    usual = values[counts.argmax()]
    if (values % usual != 0).any():  # milliseconds, say
        return gaps
    gaps[:-1] = ~last[:-1] & (np.diff(steps) != usual)
    if gaps.any():
        row = int(gaps.argmax())
        notes.append(
            f"Rows of {what} are missing in {int(gaps.sum())} places, first after row {row}, where "
            f"steps go from {steps[row]:g} to {steps[row + 1]:g}: the episodes are cut off there."
        )
    return gaps


# Ends ---------------------------------------------------------------------------------


def read_ends(
    arrays: dict[str, Any],
    steps: int,
    rows: Rows,
    what: str,
    notes: list[str],
    *,
    is_episode: bool = False,
) -> Ends:
    """Return where the episodes of a log end.

    Args:
        arrays: those of one log, of which those are read that tell ends.
        steps: how many rows there are.
        rows: see :func:`row_order`.
        what: what has them, for messages.
        notes: what to say of the log; it is added to.

    Keyword Args:
        is_episode: whether the log is known to be one episode.

    Raises:
        KeyError: if nothing tells ends.
        ValueError: if arrays contradict each other.
    """
    last = rows.last
    if last is not None and len(last) != steps:
        raise _other_length("episodes or steps", len(last), what, steps)
    given = _given(arrays, steps, rows, what)
    if not given and last is None and not is_episode:
        raise MissingEntryError(
            f"Nothing in {what} tells where an episode ends: one or several of {list(TELL_ENDS)} are "
            f"missing. If it is one episode that was cut off, say terminations=np.zeros({steps})."
        )
    none = torch.zeros(steps, dtype=torch.bool)
    terminated, truncated, done = (
        given.get(name) for name in ("terminations", "truncations", "dones")
    )
    plain = none
    if done is not None and terminated is None and truncated is None:
        plain = done
    elif done is not None:
        terminated, truncated = _told(terminated, truncated, done, what)
    elif terminated is None and truncated is not None:
        notes.append(
            f"There are truncations and no terminations in {what}: no episode is read as "
            f"terminated. Give terminations, or dones beside truncations."
        )
    elif not given:
        plain = none.clone() if last is None else last.clone()
        plain[-1] = True
    last = none.clone() if last is None else last
    terminated = none if terminated is None else terminated
    truncated = none if truncated is None else truncated
    ended = terminated | truncated | plain
    gaps = none if rows.gaps is None else rows.gaps
    final = _final(ended, last, gaps) if "episodes" in arrays else none
    last = last | ended | gaps
    last[-1] = True
    is_assumed = not given and rows.last is not None
    return Ends(terminated, truncated, plain, last, final, is_assumed)


def _final(ended: torch.Tensor, last: torch.Tensor, gaps: torch.Tensor) -> torch.Tensor:
    """Return the single rows of the same id after an end, which have only the observation there, ``[N]``."""
    final = torch.zeros_like(last)
    final[1:] = ended[:-1] & ~gaps[:-1] & ~last[:-1] & last[1:]
    # With several ends below one id, it is that of a worker or a day: a new episode begins there.
    number = last.long().cumsum(0) - last.long()
    ends = torch.zeros(len(last), dtype=torch.long).index_add_(0, number, ended.long())
    return final & (ends.max() <= 1)


def _given(
    arrays: dict[str, Any], steps: int, rows: Rows, what: str
) -> dict[str, torch.Tensor]:
    """Return the ends that arrays say themselves, ``[N]`` bool each, in the order of rows."""
    given = {}
    for name in ("terminations", "truncations", "dones"):
        if name not in arrays:
            continue
        value = flags(f"{name} of {what}", numbers(name, arrays[name], what))
        if len(value) != steps:
            raise _other_length(name, len(value), what, steps)
        given[name] = value.flatten() if rows.order is None else value[rows.order, 0]
    return given


def _told(
    terminated: torch.Tensor | None,
    truncated: torch.Tensor | None,
    done: torch.Tensor,
    what: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return terminations and truncations, one of which may be found from dones."""
    if terminated is None:
        terminated = done & ~truncated
    elif truncated is None:
        truncated = done & ~terminated
    wrong = done != (terminated | truncated)
    if wrong.any():
        row = int(wrong.long().argmax())
        raise ValueError(
            f"dones of {what} must be where it has terminations or truncations, and are not in "
            f"{int(wrong.sum())} rows, first in row {row}. Leave dones out, or repair them."
        )
    return terminated, truncated


def _other_length(name: str, length: int, what: str, steps: int) -> ValueError:
    return ValueError(
        f"{name} of {what} has {length} rows, and there are {steps} rewards, so {steps} were "
        f"expected."
    )


def kind_of_ends(
    ends: Sequence[Ends], dones: str | None, notes: list[str]
) -> str | None:
    """Return what plain ends are: as said, or as their lengths suggest, with a note.

    Args:
        ends: those of each log.
        dones: "terminal", "timeout", or None to infer it.
        notes: what to say of the data; it is added to.

    Returns:
        One of both, None if there are no plain ends.

    Raises:
        ValueError: if ``dones`` is another, or no end is plain.
    """
    if dones is not None and dones not in KINDS:
        raise ValueError(f"Unknown dones {dones!r}. Valid choices are {list(KINDS)}.")
    lengths = _lengths(ends)
    if not lengths:
        if dones is not None and not any(one.plain.any() for one in ends):
            raise ValueError(
                f"dones={dones!r} says what ends are that do not tell it themselves, and the data "
                f"has no such: it has terminations or truncations, or no end. Leave dones out."
            )
        return dones
    if dones is not None:
        return dones
    least, most = min(lengths), max(lengths)
    kind, other = KINDS if least < most else KINDS[::-1]
    how = {"terminal": "terminations", "timeout": "truncations, as by a time limit"}
    which = f"{len(lengths)} episodes end" if len(lengths) > 1 else "episode ends"
    text = f"The data does not say why its {which}. "
    if least < most:
        text += f"They have from {least} to {most} steps"
    else:
        text += f"{'Each' if len(lengths) > 1 else 'It'} has {most} steps"
    text += (
        f", so that is read as {how[kind]}. If these are {how[other]}: dones={other!r}, on the "
        f"command line --dones {other}."
    )
    if kind == "terminal" and lengths.count(most) > 1:
        text += (
            f" {lengths.count(most)} of them have {most} steps, which may be a time limit: then "
            f"give truncations beside dones."
        )
    notes.append(text)
    return kind


def _lengths(ends: Sequence[Ends]) -> list[int]:
    """Return the lengths of the episodes with plain ends."""
    lengths: list[int] = []
    for one in ends:
        stops = one.last.nonzero().flatten()
        each = torch.diff(stops, prepend=torch.tensor([-1]))[one.plain[stops]].tolist()
        # The log may stop before its last episode does.
        if one.is_assumed and len(each) > 2 and each[-1] < min(each[:-1]):
            each = each[:-1]
        lengths += each
    return lengths
