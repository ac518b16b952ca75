"""Checkpoints of runs, on TorchRL's Checkpoint: plain files, and replay that is appended.

A checkpoint is a folder with a manifest and a file for each part. The transitions of a replay
buffer are in files beside the checkpoints, to which each checkpoint adds what is new since the
one before. What a checkpoint writes does not grow with the replay.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.checkpoint import Checkpoint, CheckpointAdapter
from torchrl.data import ReplayBuffer, TensorStorage
from torchrl.data.replay_buffers.samplers import PrioritizedSampler
from torchrl.data.replay_buffers.writers import RoundRobinWriter

from torchrl_wm import _upstream
from torchrl_wm._files import read_plain, write_plain
from torchrl_wm.modules.keys import as_tuple, leaf_keys
from torchrl_wm.trainers.frame_storage import FrameStorage, unpacked

#: How many checkpoints a run keeps.
KEEP = 2
_WRITER = "a run"
_SEGMENT = re.compile(r"rows_(\d+)_(\d+)_(\d+)\.pt")


class MisfitError(ValueError):
    """A part of a checkpoint is not damaged, but does not fit what it is loaded into."""


class PlainAdapter(CheckpointAdapter):
    """A checkpoint adapter that saves the ``state_dict`` of a part as one file of plain data.

    The file is written as a whole or not at all. Reading it compares its checksums, and executes
    nothing in it.

    Args:
        name: the part's name, for errors.
    """

    adapter_id = "torchrl_wm.plain"

    def __init__(self, name: str = "part") -> None:
        self._name, self._is_readable = name, False

    def save(self, component: Any, path: Path, **_: Any) -> None:
        """Write ``component.state_dict()``.

        Raises:
            TypeError: if it holds something that could not be read again.
        """
        path.mkdir(parents=True, exist_ok=True)
        write_plain(component.state_dict(), path / "state.pt")
        if self._is_readable:
            return
        try:  # once: more can be written than can be read
            read_plain(path / "state.pt", "part of a checkpoint", _WRITER)
        except ValueError as err:
            found = re.search(r"GLOBAL (\S+)", str(err.__cause__))
            raise TypeError(
                f"The state_dict of the part {self._name!r} ({type(component).__name__}) holds "
                f"a {found[1] if found else 'thing'} that could not be read again. Keep tensors, "
                f"numbers, strings, and lists, tuples and dictionaries of them in it."
            ) from err
        self._is_readable = True

    def load(self, component: Any, path: Path, **_: Any) -> None:
        """Read the state of a part into ``component``.

        Raises:
            ValueError: if the file is damaged.
            MisfitError: if it does not fit.
        """
        state = read_plain(path / "state.pt", "part of a checkpoint", _WRITER)
        try:
            component.load_state_dict(state)
        except (
            AttributeError,
            LookupError,
            TypeError,
            RuntimeError,
            ValueError,
        ) as err:
            raise MisfitError(f"{type(err).__name__}: {err}") from err


class ReplayAdapter(CheckpointAdapter):
    """A checkpoint adapter that appends the new transitions of a replay buffer to a run's files.

    All rows that were ever written are numbered. A buffer is restored from the newest rows up to
    a checkpoint's count, and a file is removed once no checkpoint needs its rows. Emptying the
    buffer begins a new series of files. Rows must not be changed in place.

    Args:
        folder: the folder of the files, which all checkpoints share.
        buffer: the buffer.
    """

    adapter_id = "torchrl_wm.replay"

    def __init__(self, folder: Path, buffer: ReplayBuffer) -> None:
        self.folder = folder
        #: ``(series, count)`` of the last checkpoints, the newest one last.
        self._saved: list[tuple[int, int]] = []
        self._series = 0
        self._files: list[_Segment] | None = None
        empty = buffer.empty

        def empty_and_note(*args: Any, **kwargs: Any) -> None:
            self._series += 1
            empty(*args, **kwargs)

        buffer.empty = empty_and_note

    def save(self, component: ReplayBuffer, path: Path, **_: Any) -> None:
        """Write the rows since the last checkpoint, and the count of all."""
        count, capacity = component.write_count, component.storage.max_size
        cursor = _upstream.cursor(component.writer)
        series, last = self._saved[-1] if self._saved else (0, 0)
        first = max(last if series == self._series else 0, count - len(component))
        if first < count:
            self.folder.mkdir(parents=True, exist_ok=True)
            # The next row will be written at the cursor.
            at = (torch.arange(first, count) - count + cursor) % capacity
            segment = _Segment(self._series, first, count)
            write_plain(plain_rows(component.storage, at), self.folder / segment.name)
            self._segments().append(segment)
        self._saved = [*self._saved, (self._series, count)][-KEEP - 1 :]
        # The checkpoint that this belongs to may still fail: keep what one more needs.
        if len(self._saved) > KEEP:
            self._remove_before(min(self._saved), capacity)
        path.mkdir(parents=True, exist_ok=True)
        content = {
            "series": self._series,
            "write_count": count,
            "cursor": cursor,
            "size": len(component),
            "capacity": capacity,
            "sampler": dict(component.sampler.state_dict()),
        }
        write_plain(content, path / "state.pt")

    def load(self, component: ReplayBuffer, path: Path, **_: Any) -> None:
        """Read the rows of a checkpoint into a buffer.

        Raises:
            ValueError: if files are damaged or missing.
            MisfitError: if the buffer has another capacity.
        """
        state = read_plain(path / "state.pt", "part of a checkpoint", _WRITER)
        count, size, cursor = state["write_count"], state["size"], state["cursor"]
        capacity = component.storage.max_size
        if state["capacity"] != capacity:
            raise MisfitError(
                f"a replay buffer of {state['capacity']} rows, and the run's has {capacity}"
            )
        component.empty()
        self._series = state["series"]
        self._saved = [(self._series, count)]
        # A full buffer has its oldest row at the cursor.
        _upstream.set_cursor(component.writer, (cursor - size) % capacity, count - size)
        for rows in self._rows(count - size, count):
            component.sampler.extend(component.writer.extend(rows))
        _upstream.set_cursor(component.writer, cursor, count)
        component.sampler.load_state_dict(state["sampler"])

    def drop_later(self) -> None:
        """Remove the rows after the checkpoint that was loaded, before the run goes on."""
        last = self._saved[-1] if self._saved else (0, 0)
        for segment in self._segments():
            if segment.place > last:
                (self.folder / segment.name).unlink(missing_ok=True)
        for left in self.folder.glob(".rows_*"):  # left by a kill while writing
            left.unlink()
        self._files = None

    def _segments(self) -> list[_Segment]:
        """Return the files in order; the folder is searched once, as there can be thousands."""
        if self._files is None:
            found = (_SEGMENT.fullmatch(file.name) for file in self.folder.glob("*"))
            self._files = sorted(
                _Segment(*map(int, match.groups())) for match in found if match
            )
        return self._files

    def _remove_before(self, oldest: tuple[int, int], capacity: int) -> None:
        """Remove the files that neither a checkpoint nor those after it need."""
        series, count = oldest
        files, number = self._segments(), 0
        while number < len(files) and files[number].place <= (series, count - capacity):
            (self.folder / files[number].name).unlink(missing_ok=True)
            number += 1
        del files[:number]

    def _rows(self, first: int, end: int) -> Iterator[TensorDictBase]:
        """Give the rows ``first`` to ``end`` of all that were written, file by file."""
        at = first
        for segment in self._segments():
            # A file that goes on beyond the end belongs to a later checkpoint, or to none.
            if segment.series != self._series or not (
                segment.first <= at < segment.end <= end
            ):
                continue
            file = self.folder / segment.name
            content = read_plain(file, "file of a run's replay", _WRITER)
            yield from_plain_rows(content)[at - segment.first :]
            at = segment.end
        if at < end:
            raise ValueError(
                f"The replay in {str(self.folder)!r} is damaged: the rows {at} to {end} are "
                f"missing."
            )


class _Segment(NamedTuple):
    """A file with the rows ``first`` to ``end`` of a series."""

    series: int
    first: int
    end: int

    @property
    def place(self) -> tuple[int, int]:
        """The end of its rows, to compare with checkpoints."""
        return self.series, self.end

    @property
    def name(self) -> str:
        return f"rows_{self.series:06d}_{self.first:012d}_{self.end:012d}.pt"


def make_checkpoint(
    parts: Mapping[str, Any], folder: Path
) -> tuple[Checkpoint, list[ReplayAdapter]]:
    """Return TorchRL's checkpoint of some parts, and the adapters of their replay buffers.

    Args:
        parts: by name; each with a ``state_dict``, or a replay buffer.
        folder: the folder to which replay is appended.

    Raises:
        TypeError: if a part cannot be saved.
    """
    checkpoint, adapters = Checkpoint(), []
    for name, part in parts.items():
        check_part(name, part)
        adapter: CheckpointAdapter = PlainAdapter(name)
        if isinstance(part, ReplayBuffer):
            adapter = ReplayAdapter(folder / name, part)
            adapters.append(adapter)
        checkpoint.register(name, part, adapter=adapter)
    return checkpoint, adapters


def all_parts(
    recipe: str,
    parts: Mapping[str, Any],
    replay: ReplayBuffer | None,
    own: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the parts of a recipe and those of its run; refuse parts that would be lost.

    Args:
        recipe: the name of the recipe.
        parts: the parts of the recipe.
        replay: its replay, which must be one of the parts.
        own: the parts of the run.

    Raises:
        TypeError: if a part has no state, or is a replay buffer that cannot be appended.
        ValueError: if names are taken, or the replay is missing.
    """
    taken = sorted(own.keys() & parts.keys())
    if taken:
        raise ValueError(
            f"The parts {taken} of the recipe {recipe!r} have names of the run's own parts. Rename "
            f"them."
        )
    if replay is not None and all(part is not replay for part in parts.values()):
        raise ValueError(
            f"The replay of the recipe {recipe!r} is none of its parts, and no checkpoint would "
            f"hold it. Add it: self.parts = {{'replay': self.replay, ...}}."
        )
    for name, part in parts.items():
        check_part(name, part)
    return {**parts, **own}


def check_part(name: str, part: Any) -> None:
    """Refuse a part that no checkpoint can hold, before a run spends time on it.

    Raises:
        TypeError: if it has no state, or is a replay buffer that cannot be appended.
    """
    if not all(hasattr(part, does) for does in ("state_dict", "load_state_dict")):
        raise TypeError(
            f"The part {name!r} is a {type(part).__name__}, which has no state_dict and "
            f"load_state_dict. Numbers are kept by torchrl_wm.trainers.recipe.Counts."
        )
    if not isinstance(part, ReplayBuffer):
        return
    if (
        not isinstance(part.storage, TensorStorage)
        or part.storage.ndim != 1
        or not isinstance(part.writer, RoundRobinWriter)
        or isinstance(part.sampler, PrioritizedSampler)
    ):
        raise TypeError(
            f"The replay buffer {name!r} cannot be appended to checkpoints: it must keep its rows "
            f"in a TensorStorage of one dim, in the order in which they come (RoundRobinWriter), "
            f"and without priorities; it has a {type(part.storage).__name__}, a "
            f"{type(part.writer).__name__} and a {type(part.sampler).__name__}. "
            f"torchrl_wm.trainers.recipe.make_replay makes one."
        )


def plain_rows(storage: TensorStorage, index: torch.Tensor) -> dict[str, Any]:
    """Return rows of a storage, ``[N]``, as plain data, with each image once."""
    if not isinstance(storage, FrameStorage):
        return {"entries": plain_entries(storage[index]), "size": len(index)}
    rows, images = storage.packed(index)
    return {
        "entries": plain_entries(rows),
        "images": [
            [list(as_tuple(key)), links, apart.cpu()]
            for key, (links, apart) in images.items()
        ],
        "size": len(index),
    }


def from_plain_rows(content: Mapping[str, Any]) -> TensorDictBase:
    """Return the complete rows of :func:`plain_rows`, ``[N]``."""
    rows = from_plain_entries(content["entries"], [content["size"]])
    images = content.get("images", ())
    return unpacked(rows, [(tuple(names), *where) for names, *where in images])


def plain_entries(rows: TensorDictBase) -> list:
    """Return a tensordict as plain data: ``[[names, tensor], ...]``."""
    return [[list(as_tuple(key)), rows.get(key).cpu()] for key in leaf_keys(rows)]


def from_plain_entries(entries: list, batch_size: list[int]) -> TensorDict:
    """Return the tensordict of :func:`plain_entries`."""
    rows = TensorDict({}, batch_size=batch_size)
    for names, value in entries:
        rows.set(tuple(names), value)
    return rows
