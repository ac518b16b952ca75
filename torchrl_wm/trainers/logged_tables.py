"""Tables in text files, ``.csv`` and ``.tsv``, as columns of numbers."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

#: How many lines are read at once.
_LINES = 20_000
_WORDS = {"true": 1.0, "false": 0.0}


def read_table(path: Path) -> dict[str, np.ndarray]:
    r"""Read a table, whose first line names the columns.

    Columns are separated by commas, semicolons or tabs. Cells are numbers, true and false in any
    case, or empty, which is NaN. A column of whole numbers, written without a point, or of true and
    false has integers; one with other text stays text, which is of use only for ids.

    Args:
        path: the file, in UTF-8.

    Returns:
        The columns ``[N]`` by name.

    Raises:
        ValueError: if the first line has no names, or a line has another number of cells.

    Examples:
        >>> import pathlib, tempfile
        >>> from torchrl_wm.trainers.logged_tables import read_table
        >>> file = pathlib.Path(tempfile.mkdtemp(), "log.csv")
        >>> _ = file.write_text("obs_0,action,done\n0.5,1,False\n0.7,0,True\n")
        >>> read_table(file)
        {'obs_0': array([0.5, 0.7]), 'action': array([1, 0], dtype=int8),
         'done': array([0, 1], dtype=int8)}
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            separator = max(",;\t", key=first.count)
            names = [
                name.strip()
                for name in next(csv.reader([first], delimiter=separator), [])
            ]
            _check_header(path, names)
            columns = [_Column() for _ in names]
            number = 2
            for lines in _blocks(file):
                _add(path, lines, number, names, separator, columns)
                number += len(lines)
    except UnicodeDecodeError as err:
        raise ValueError(
            f"{os.fspath(path)!r} is no text in UTF-8 ({err}). Save it as CSV in UTF-8."
        ) from err
    out = {}
    for name, column in zip(names, columns):
        out[name] = column.values()
    return out


class _Column:
    """A column, block by block: integers as long as all cells are, then floats, then text."""

    def __init__(self) -> None:
        self.blocks: list[np.ndarray] = []

    def values(self) -> np.ndarray:
        """Return the cells ``[N]``; the blocks are given up."""
        blocks, self.blocks = self.blocks, []
        kinds = {block.dtype.kind for block in blocks}
        if "O" in kinds:
            return np.concatenate([block.astype(object) for block in blocks])
        return np.concatenate(blocks) if blocks else np.zeros(0)


def _blocks(file: io.TextIOBase) -> Iterator[list[str]]:
    """Give the lines of a file, some at once."""
    while lines := list(islice(file, _LINES)):
        yield lines


def _check_header(path: Path, names: Sequence[str]) -> None:
    name = os.fspath(path)
    if not any(names):
        raise ValueError(f"{name!r} is empty: its first line must name the columns.")
    if all(_is_number(cell) for cell in names):
        raise ValueError(
            f"The first line of {name!r} must name the columns, such as "
            f"obs_0,obs_1,action,reward,done, and is {','.join(names)[:80]!r}."
        )
    twice = sorted({cell for cell in names if names.count(cell) > 1})
    if twice:
        raise ValueError(f"{name!r} has several columns {twice}: rename them.")


def _add(
    path: Path,
    lines: list[str],
    number: int,
    names: Sequence[str],
    separator: str,
    columns: list[_Column],
) -> None:
    """Add the cells of some lines to their columns; ``number`` is that of the first line."""
    table = None
    if '"' not in "".join(lines):
        try:  # by numpy, if all are numbers
            table = np.loadtxt(
                lines, delimiter=separator, ndmin=2, comments=None, dtype=np.float64
            )
        except ValueError:
            pass
    if table is None or table.shape[1] != len(names):
        _add_text(path, lines, number, names, separator, columns)
        return
    if not len(table):
        return
    for place, column in enumerate(columns):
        values = table[:, place].copy()
        if _may_be_whole(values):
            cells = (
                line.split(separator, place + 1)[place]
                for line in lines
                if line.strip()
            )
            values = _as_whole(values, cells)
        column.blocks.append(values)


def _add_text(
    path: Path,
    lines: list[str],
    number: int,
    names: Sequence[str],
    separator: str,
    columns: list[_Column],
) -> None:
    """Add the cells of some lines that are not all numbers."""
    rows = []
    for row, cells in enumerate(csv.reader(lines, delimiter=separator), number):
        if not cells:
            continue  # an empty line
        if len(cells) != len(names):
            raise ValueError(
                f"Line {row} of {os.fspath(path)!r} has {len(cells)} cells, and its first line names "
                f"{len(names)} columns. Repair it, or leave it out."
            )
        rows.append(cells)
    if not rows:
        return
    for column, cells in zip(columns, zip(*rows)):
        values = _parsed(cells)
        if values.dtype.kind == "f" and _may_be_whole(values):
            values = _as_whole(values, cells)
        column.blocks.append(values)


def _parsed(cells: Sequence[str]) -> np.ndarray:
    """Return cells as floats, or as objects if there is text among them."""
    try:
        return np.array([_number(cell) for cell in cells])
    except ValueError:
        out, known = np.empty(len(cells), object), {}
        for place, cell in enumerate(cells):
            value = _number(cell) if _is_number(cell) else cell.strip()
            out[place] = known.setdefault(value, value)  # each text once
        return out


def _number(cell: str) -> float:
    cell = cell.strip()
    if not cell:
        return float("nan")
    value = _WORDS.get(cell.lower())
    return float(cell) if value is None else value


def _is_number(cell: str) -> bool:
    try:
        _number(cell)
    except ValueError:
        return False
    return True


def _may_be_whole(values: np.ndarray) -> bool:
    return bool((np.abs(values) < 2**53).all() and (values == np.floor(values)).all())


def _as_whole(values: np.ndarray, cells: Iterator[str] | Sequence[str]) -> np.ndarray:
    """Return whole numbers as integers, if all cells are written without a point."""
    cells = (cell.strip() for cell in cells)
    if not all(cell.lstrip("+-").isdigit() or cell.lower() in _WORDS for cell in cells):
        return values
    most = np.abs(values).max()
    kind = next(k for k in (np.int8, np.int32, np.int64) if most <= np.iinfo(k).max)
    return values.astype(kind)
