"""Files that are written as a whole or not at all, and read without running code."""

from __future__ import annotations

import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

_PLAIN = (str, int, float, bool, type(None))


def write_plain(content: Any, path: str | os.PathLike) -> None:
    """Write tensors and plain data; an older file of that name stays whole if this fails."""
    _write(path, lambda file: torch.save(content, file))


def write_text(text: str, path: str | os.PathLike) -> None:
    """Write a text; an older file of that name stays whole if this fails."""
    _write(path, lambda file: file.write(text.encode("utf-8")))


def _write(path: str | os.PathLike, write: Callable[[BinaryIO], Any]) -> None:
    path = Path(path)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # a name must not come before its content
        os.chmod(partial, _mode(path))
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def read_plain(path: str | os.PathLike, what: str, writer: str) -> Any:
    """Read what :func:`write_plain` wrote. Nothing in the file is executed.

    Args:
        path: the file.
        what: what it should be, for errors.
        writer: the call that writes such files, for errors.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or holds something else.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no {what} {os.fspath(path)!r}.")
    try:
        # An open file: torch chooses how to read a file name by its ending.
        with open(path, "rb") as file:
            _check_sums(file)
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        raise ValueError(
            f"{os.fspath(path)!r} is no {what}, or a damaged one: it holds something "
            f"else than tensors and plain data. Nothing of it was executed. Write such files with "
            f"{writer}."
        ) from err
    except Exception as err:
        raise ValueError(
            f"{os.fspath(path)!r} is no {what}, or a damaged one, for example because "
            f"writing it was interrupted ({type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''})."
        ) from err


def check_plain(value: Any, where: str) -> None:
    """Refuse what a file without code cannot hold."""
    if isinstance(value, torch.Tensor) or type(value) in _PLAIN:
        return
    if type(value) in (list, tuple):
        for item in value:
            check_plain(item, where)
        return
    if type(value) is dict:
        for key, item in value.items():
            check_plain(item, f"{where}[{key!r}]")
        return
    raise TypeError(
        f"A world model file holds tensors, numbers and strings; {where} is a "
        f"{type(value).__module__}.{type(value).__name__}."
    )


def _mode(path: Path) -> int:
    """Return the permissions of the file that is replaced, or those of a new file."""
    if path.exists():
        return path.stat().st_mode & 0o777
    mask = os.umask(0)  # it cannot be read without setting it
    os.umask(mask)
    return 0o666 & ~mask


def _check_sums(file: BinaryIO) -> None:
    """Refuse a file whose checksums are wrong; torch does not compare them."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
    file.seek(0)
