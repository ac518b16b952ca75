"""Files and folders of logged data: arrays, tensordicts, replay buffers, Minari datasets."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase

from torchrl_wm.trainers.logged_minari import minari_dataset, minari_folder

_MINARI = "minari:"


def read(source: str | os.PathLike) -> Any:
    """Read a file, a folder or a Minari dataset.

    Raises:
        FileNotFoundError: if there is no such file, folder or dataset.
        ValueError: if it is of another kind.
    """
    name = os.fspath(source)
    if name.startswith(_MINARI):
        return minari_dataset(name[len(_MINARI) :])
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
            return minari_folder(folder)
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
    """Read the storage of a replay buffer, oldest step first, as ``[*B, T]``."""
    about = _read_json(folder / "storage_metadata.json")
    if about.get("is_pytree") or not (folder / "meta.json").is_file():
        raise ValueError(
            f"The replay buffer in {os.fspath(folder)!r} holds no tensordict. Load it yourself, "
            f"buffer.loads(path), and pass its content as arrays."
        )
    data, length = TensorDict.load_memmap(folder), about["len"]
    file = folder.parent / "writer" / "metadata.json"
    writer = _read_json(file) if folder.name == "storage" and file.is_file() else {}
    # Storages of several dims have time first, and count the steps of all rows.
    across = data.batch_size[1:].numel()
    if length > len(data) or writer.get("write_count", length) * across == length:
        times = oldest_first(data[: length // across], 0, writer.get("cursor", 0))
        return times.transpose(0, -1) if data.batch_dims > 1 else times
    return oldest_first(data[:length], 0, writer.get("cursor", 0))


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def oldest_first(data: TensorDictBase, dim: int, cursor: int) -> TensorDictBase:
    """Return the steps of a ring buffer, which writes next at ``cursor``, in their order."""
    length = data.batch_size[dim]
    if not 0 < cursor < length:
        return data
    order = torch.arange(length).roll(-cursor)
    return data[(slice(None),) * dim + (order,)]
