"""Files and folders of logged data: arrays, tables, tensordicts, replay buffers, Minari datasets."""

from __future__ import annotations

import glob
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase

from torchrl_wm.trainers.logged_minari import minari_dataset, minari_folder
from torchrl_wm.trainers.logged_tables import read_table

_MINARI = "minari:"
_KINDS = (
    "an .npz, .hdf5 or .csv file, a folder of buffer.dumps(...), of tensordict.memmap(...) or of a "
    "Minari dataset"
)
#: What of an HDF5 file says nothing of transitions.
_BESIDE = ("infos", "metadata")


def is_pattern(name: str) -> bool:
    """Return whether a name is a pattern of files, ``logs/*.csv``, and no file."""
    return glob.has_magic(name) and not os.path.exists(name)


def read(source: str | os.PathLike) -> Any:
    """Read a file, a folder, a Minari dataset, or, as a list, the files of a pattern.

    Raises:
        FileNotFoundError: if there is no such file, folder or dataset.
        ValueError: if it is of another kind.
    """
    name = os.fspath(source)
    if name.startswith(_MINARI):
        return minari_dataset(name[len(_MINARI) :])
    if is_pattern(name):
        files = sorted(glob.glob(name, recursive=True))
        if not files:
            raise FileNotFoundError(f"There is no file that matches {name!r}.")
        return [read(file) for file in files]
    path = Path(source)
    if path.is_file():
        reader = _READERS.get(path.suffix.lower())
        if reader is not None:
            return reader(path)
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
            f"There is no {name!r}. Name {_KINDS}, or 'minari:<id>'."
        )
    raise ValueError(f"{name!r} is not {_KINDS}.")


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            flat = dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as err:
        raise ValueError(
            f"{os.fspath(path)!r} cannot be read as arrays ({err}). Arrays of objects are not "
            f"read, as they may hold code."
        ) from err
    return flat


def _read_hdf5(path: Path) -> dict[str, Any]:
    try:
        import h5py
    except ImportError as err:
        raise ImportError(
            "HDF5 files need h5py: pip install h5py, or torchrl-wm[minari], which brings it."
        ) from err
    out: dict[str, Any] = {}

    def add(name: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        # Named beside what is read, and too large to be read for nothing.
        out[name] = None if name.split("/")[0] in _BESIDE else item[()]

    try:
        with h5py.File(path, "r") as file:
            file.visititems(add)
    except OSError as err:
        raise ValueError(
            f"{os.fspath(path)!r} cannot be read as HDF5 ({err})."
        ) from err
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


_READERS = {
    ".npz": _read_npz,
    ".csv": read_table,
    ".tsv": read_table,
    ".hdf5": _read_hdf5,
    ".h5": _read_hdf5,
}
