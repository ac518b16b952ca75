"""A storage of transitions that keeps each image once."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable
from math import prod
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tensordict import is_tensor_collection, NestedKey, TensorDictBase
from torchrl.data import LazyTensorStorage

from torchrl_wm.modules.keys import is_next, join, leaf_keys

#: How many images kept apart there is room for at first.
_FIRST_ROOM = 16
#: How many rows are copied at once, as complete rows need twice the memory.
_AT_ONCE = 1024


class FrameStorage(LazyTensorStorage):
    """A storage of transitions that keeps each image once, and gives complete transitions.

    The image after a step is that before another step, unless an episode ends. An entry is such an
    image if rows have it at their root and under "next", as uint8 of two dims or more. Rows are
    compared when they are written, and images are shared only where they are equal: rows that
    do not follow each other take more memory, and are as right. Other entries are kept as
    :class:`~torchrl.data.LazyTensorStorage` keeps them.

    ``storage[:]`` makes copies of all images after steps. The storage is not shared between
    processes.

    Args:
        max_size: how many rows are kept; the oldest one is replaced then.

    Keyword Args:
        device: the device of the rows.
        images: where images are kept: in the memory of ``device``, or on the disk, in files
            without a name in the folder for temporary files (the environment variable TMPDIR),
            which the system removes when the process ends, even when it is killed.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_wm.trainers.frame_storage import FrameStorage
        >>> images = torch.randint(256, (6, 8, 8, 3), dtype=torch.uint8)
        >>> storage = FrameStorage(100)
        >>> storage.set(range(5), TensorDict({"pixels": images[:5], ("next", "pixels"): images[1:]}, [5]))
        >>> bool((storage[2:4]["next", "pixels"] == images[3:5]).all()), storage.number_of_images
        (True, 6)
    """

    def __init__(
        self,
        max_size: int,
        *,
        device: torch.device | str = "cpu",
        images: Literal["memory", "disk"] = "memory",
    ) -> None:
        super().__init__(max_size, device=device)
        self.images = images
        self._shared: dict[NestedKey, SharedFrames] = {}

    @property
    def number_of_images(self) -> int:
        """How many images are kept, of all entries."""
        return sum(len(self) + frames.number_apart for frames in self._shared.values())

    def set(self, cursor: Any, data: Any, *, set_cursor: bool = True) -> None:
        """Write rows; see :class:`~torchrl.data.TensorStorage`."""
        if isinstance(data, list) and all(map(is_tensor_collection, data)):
            data = torch.stack(data)
        if not is_tensor_collection(data):
            super().set(cursor, data, set_cursor=set_cursor)
            return
        rows = _row_numbers(cursor, self.max_size)
        if len({*rows}) < len(rows):  # of what is written to one row, the last stays
            last = {row: number for number, row in enumerate(rows)}
            numbers = sorted(last.values())
            data, rows = data[numbers], [rows[number] for number in numbers]
            cursor = torch.tensor(rows)
        is_first = not len(self)
        single = data[None] if isinstance(cursor, Integral) else data
        keys = image_keys(single) if is_first else list(self._shared)
        both = [key for image in keys for key in (image, join("next", image))]
        super().set(cursor, data.exclude(*both), set_cursor=set_cursor)
        if is_first:  # also after the storage was emptied
            shapes = {key: single.get(key).shape[1:] for key in keys}
            self._shared = {
                key: SharedFrames(self.max_size, shape, self._room)
                for key, shape in shapes.items()
            }
        for key, frames in self._shared.items():
            frames.write(rows, single.get(key), single.get(join("next", key)))

    def get(self, index: Any) -> Any:
        """Return complete rows, of the index's shape."""
        rows = super().get(index)
        if not self._shared:
            return rows
        rows = rows.copy()
        for key, frames in self._shared.items():
            before, after = frames.read(index, len(self))
            rows.set(key, before.to(self.device))
            rows.set(join("next", key), after.to(self.device))
        return rows

    def packed(
        self, index: torch.Tensor
    ) -> tuple[TensorDictBase, dict[NestedKey, tuple[torch.Tensor, torch.Tensor]]]:
        """Return rows with each image once: what :func:`unpacked` makes complete rows of.

        Args:
            index: the rows, ``[N]``.

        Returns:
            The rows without the images after steps, ``[N]``. And for each entry of images, where
            the image after each step is, ``[N]``: ``n`` for the image before the step of row ``n``,
            ``~n`` for the ``n``-th of the images that come then.
        """
        rows = super().get(index).copy()
        images = {}
        for key, frames in self._shared.items():
            before, *images[key] = frames.packed(index, len(self))
            rows.set(key, before)
        return rows, images

    def state_dict(self) -> dict[str, Any]:
        """Return the complete rows, in the form of TorchRL's storages."""
        return self._complete().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Write the rows of a state into an empty storage."""
        plain = LazyTensorStorage(self.max_size)
        plain.load_state_dict(state_dict)
        self._fill(plain)

    def dumps(self, path: str | Path) -> None:
        """Write the complete rows into a folder, in the form of TorchRL's storages."""
        self._complete().dumps(path)

    def loads(self, path: str | Path) -> None:
        """Read the rows of a folder into an empty storage."""
        plain = LazyTensorStorage(self.max_size)
        plain.loads(path)
        self._fill(plain)

    def _complete(self) -> LazyTensorStorage:
        """Return a storage of TorchRL's with the complete rows."""
        plain = LazyTensorStorage(max(1, len(self)))
        for rows in torch.arange(len(self)).split(_AT_ONCE):
            plain.set(rows, self[rows])
        return plain

    def _fill(self, plain: LazyTensorStorage) -> None:
        """Write the rows of a storage of TorchRL's into this one, which is empty."""
        if len(self):
            raise ValueError(
                f"This storage holds {len(self)} rows, and reads others only if it is empty: call "
                f"empty() of its buffer first."
            )
        for rows in torch.arange(len(plain)).split(_AT_ONCE):
            self.set(rows, plain[rows])

    def _room(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return room for images, ``[N, *I]``; memory and disk are taken as it is filled."""
        if self.images == "memory":
            return torch.empty(shape, dtype=torch.uint8, device=self.device)
        folder, needed = tempfile.gettempdir(), prod(shape)
        free = shutil.disk_usage(folder).free
        if free < needed:
            warnings.warn(
                f"A full replay has {needed / 1e9:.1f} GB of images on disk, and {folder!r} has "
                f"{free / 1e9:.1f} GB left. Keep fewer steps, or set the environment variable "
                f"TMPDIR to a folder on a larger disk.",
                stacklevel=2,
            )
        with tempfile.TemporaryFile() as file:
            return torch.from_numpy(np.memmap(file, np.uint8, "w+", shape=shape))


class SharedFrames:
    """The images of one entry before and after steps, of which equal ones are kept once.

    Args:
        capacity: how many rows there are.
        shape: that of an image, ``[*I]``.
        room: returns room for images of a shape ``[N, *I]``.
    """

    def __init__(
        self,
        capacity: int,
        shape: tuple[int, ...],
        room: Callable[[tuple[int, ...]], torch.Tensor],
    ) -> None:
        self._capacity, self._room = capacity, room
        #: The images before the steps, ``[capacity, *I]``.
        self._before = room((capacity, *shape))
        #: The images after steps that no row begins with. None is at place 0.
        self._apart = room((min(_FIRST_ROOM, capacity + 1), *shape))
        self._free = list(range(1, len(self._apart)))
        #: Where the image after each step is: the row that begins with it, or ``~place`` apart.
        self._links = np.full(capacity, -1)
        #: The row whose step ends with the image that a row begins with; -1 for none.
        self._earlier = np.full(capacity, -1)
        #: The rows whose image is apart, by its hash: the next row may begin with it.
        self._waiting: dict[int, dict[int, None]] = {}
        self._hashes: dict[int, int] = {}

    @property
    def number_apart(self) -> int:
        """How many images are kept beside those that rows begin with."""
        return len(self._apart) - 1 - len(self._free)

    def write(self, rows: list[int], before: torch.Tensor, after: torch.Tensor) -> None:
        """Write the images before and after the steps of rows, ``[N, *I]``."""
        self._release(rows)
        hashes = zip(_hashes(before), _hashes(after))
        before, after = before.to(self._before.device), after.to(self._before.device)
        self._before[rows] = before
        numbers: dict[int, int] = {}  # the rows so far, whose images are not apart yet
        for number, (row, (begins, ends)) in enumerate(zip(rows, hashes)):
            earlier = next(reversed(self._waiting.get(begins, {})), None)
            if earlier is not None:
                if earlier in numbers:
                    other = after[numbers[earlier]]
                else:
                    other = self._apart[~self._links[earlier]]
                if torch.equal(other, before[number]):
                    self._stop_waiting(earlier)
                    self._free_place(earlier)
                    self._links[earlier], self._earlier[row] = row, earlier
            self._waiting.setdefault(ends, {})[row] = None
            self._hashes[row] = ends
            numbers[row] = number
        left = [row for row in rows if self._links[row] < 0]
        self._put_apart(left, after[[numbers[row] for row in left]])

    def read(self, index: Any, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the images before and after steps, ``[*index, *I]``, of the first ``length`` rows."""
        links = torch.from_numpy(self._links)[:length][_on(index, torch.device("cpu"))]
        before = self._before[:length][_on(index, self._before.device)]
        return before, followed(links, self._before, self._apart)

    def packed(
        self, index: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the images before steps, ``[N, *I]``, and what :func:`followed` takes."""
        before, after = self.read(index, length)
        numbers = {row: number for number, row in enumerate(index.tolist())}
        links = [numbers.get(self._links[row], -1) for row in numbers]
        links = torch.tensor(links)
        apart = links < 0
        links[apart] = ~torch.arange(int(apart.sum()))
        return before, links, after[apart.to(after.device)]

    def _release(self, rows: list[int]) -> None:
        """Forget rows before others are written there, and keep what other rows share with them."""
        replaced, kept = set(rows), {}
        for row in rows:
            earlier, link = self._earlier[row], self._links[row]
            if earlier >= 0 and earlier not in replaced:
                kept[earlier] = row
            self._earlier[row] = -1
            if link >= 0:
                self._earlier[link] = -1
            self._stop_waiting(row)
            self._free_place(row)
            self._links[row] = -1
        self._put_apart(list(kept), self._before[list(kept.values())])

    def _stop_waiting(self, row: int) -> None:
        number = self._hashes.pop(row, None)
        if number is not None:
            rows = self._waiting[number]
            del rows[row]
            if not rows:
                del self._waiting[number]

    def _free_place(self, row: int) -> None:
        if self._links[row] < -1:
            self._free.append(~int(self._links[row]))

    def _put_apart(self, rows: list[int], images: torch.Tensor) -> None:
        """Keep the images after the steps of rows, ``[N, *I]``, apart."""
        if not rows:
            return
        size = len(self._apart)
        if len(self._free) < len(rows):
            used = size - len(self._free)
            more = min(max(2 * size, used + len(rows)), self._capacity + 1)
            room = self._room((more, *images.shape[1:]))
            room[:size] = self._apart
            self._apart = room
            self._free += range(size, more)
        places = [self._free.pop() for _ in rows]
        self._apart[places] = images
        self._links[rows] = [~place for place in places]


def image_keys(rows: TensorDictBase) -> list[NestedKey]:
    """Return the root keys of images that rows ``[N]`` have before and after their steps."""

    def is_image(value: Any) -> bool:
        is_bytes = isinstance(value, torch.Tensor) and value.dtype is torch.uint8
        return is_bytes and value.ndim > 2

    found = []
    for key in leaf_keys(rows):
        before, after = rows.get(key), rows.get(join("next", key), None)
        if not is_next(key) and is_image(before) and is_image(after):
            found += [key] if before.shape == after.shape else []
    return found


def followed(
    links: torch.Tensor, before: torch.Tensor, apart: torch.Tensor
) -> torch.Tensor:
    """Return the images after steps, ``[*B, *I]``.

    Args:
        links: where they are, ``[*B]``: ``n`` for ``before[n]``, ``~n`` for ``apart[n]``.
        before: images before steps, ``[N, *I]``.
        apart: the others, ``[M, *I]``.
    """
    links = links.to(before.device)
    after = before[links.clamp(min=0)]
    is_apart = links < 0
    if is_apart.any():
        after[is_apart] = apart[~links[is_apart]]
    return after


def unpacked(
    rows: TensorDictBase,
    images: Iterable[tuple[NestedKey, torch.Tensor, torch.Tensor]],
) -> TensorDictBase:
    """Return complete rows, ``[N]``, of what :meth:`FrameStorage.packed` returned."""
    for key, links, apart in images:
        rows.set(join("next", key), followed(links, rows.get(key), apart))
    return rows


def _row_numbers(cursor: Any, capacity: int) -> list[int]:
    """Return the rows that a cursor of a storage means."""
    if isinstance(cursor, slice):
        return list(range(*cursor.indices(capacity)))
    numbers = torch.as_tensor(cursor)
    if numbers.dtype is torch.bool:
        numbers = numbers.nonzero()
    return [row % capacity for row in numbers.flatten().tolist()]


def _hashes(images: torch.Tensor) -> list[int]:
    return [hash(image.tobytes()) for image in images.cpu().numpy()]


def _on(index: Any, device: torch.device) -> Any:
    if isinstance(index, tuple):
        return tuple(_on(part, device) for part in index)
    return index.to(device) if isinstance(index, torch.Tensor) else index
