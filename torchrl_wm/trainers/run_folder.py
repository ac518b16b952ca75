"""Where a run keeps its settings, metrics and checkpoints."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrl_wm._files import read_plain, write_plain, write_text

#: What marks a checkpoint as one of ours.
FORMAT = "torchrl_wm.run"
#: Raised with each change that an older version cannot read.
VERSION = 1

_NAME = re.compile(r"checkpoint_(\d+)\.pt")


class RunFolder:
    """A folder with all that a run leaves behind.

    ========================  ==================================================
    file                      what
    ========================  ==================================================
    ``config.json``           the resolved settings
    ``metrics.csv``           a row for each episode or evaluation
    ``tensorboard/``          the same as curves, where tensorboard is installed
    ``checkpoints/*.pt``      the last checkpoints, read without running code
    ========================  ==================================================

    Make one with :meth:`create`, and open one that is there with :meth:`open`.

    Args:
        path: the folder.
        keep: how many checkpoints to keep.

    Examples:
        >>> import tempfile
        >>> from torchrl_wm.trainers import RunFolder
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = RunFolder.create(folder + "/run", {"algorithm": "pets"})
        ...     run.log({"step": 200, "return": -1200.0})
        ...     path = run.save({"steps": 200}, number=200)
        ...     again = RunFolder.open(folder + "/run")
        ...     again.config, again.load()["steps"], again.metrics()
        ({'algorithm': 'pets'}, 200, [{'step': 200, 'return': -1200.0}])
    """

    def __init__(self, path: str | os.PathLike, *, keep: int = 2) -> None:
        self.path, self.keep = Path(path), keep
        self.config: dict[str, Any] = {}
        self._rows: list[dict[str, Any]] = []
        self._writer: Any = None
        self._purged_from: int | None = None

    @staticmethod
    def check_free(path: str | os.PathLike) -> None:
        """Refuse a folder with something in it.

        Raises:
            FileExistsError: if there is something in it already.
        """
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(
                f"{str(path)!r} exists already. Go on with that run, if it is one of pets or mbpo, "
                f"by --resume {path} (in Python: Trainer.resume({str(path)!r})); or remove it, or "
                f"choose another folder."
            )

    @classmethod
    def create(
        cls, path: str | os.PathLike, config: Mapping[str, Any], *, keep: int = 2
    ) -> RunFolder:
        """Make a new folder.

        Raises:
            FileExistsError: if there is something in it already.
        """
        cls.check_free(path)
        run = cls(path, keep=keep)
        run.checkpoints.mkdir(parents=True)
        run.config = dict(config)
        text = json.dumps(run.config, indent=2)
        write_text(text + "\n", run.path / "config.json")
        return run

    @classmethod
    def open(cls, path: str | os.PathLike, *, keep: int = 2) -> RunFolder:
        """Open the folder of a run.

        Raises:
            FileNotFoundError: if it is not the folder of a run.
            ValueError: if its settings cannot be read.
        """
        run = cls(path, keep=keep)
        file = run.path / "config.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"{str(run.path)!r} is not the folder of a run: it has no config.json."
            )
        try:
            run.config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as err:
            raise ValueError(f"{str(file)!r} is damaged: {err}") from err
        run._rows = run._read_rows()
        return run

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    # Metrics ---------------------------------------------------------------

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a row of numbers; ``step`` is where it stands in curves."""
        names = self._names()
        self._rows.append(dict(row))
        if set(row) <= set(names):
            with open(self.path / "metrics.csv", "a", newline="") as file:
                csv.DictWriter(file, names).writerow(row)
        else:
            self._write_rows()
        writer = self._tensorboard()
        if writer is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "step":
                    writer.add_scalar(name, value, row.get("step"))
            writer.flush()

    def metrics(self) -> list[dict[str, Any]]:
        """The rows so far; what a row does not have is left out."""
        return [dict(row) for row in self._rows]

    def restore(self, rows: list[dict[str, Any]]) -> None:
        """Let ``rows``, those of a checkpoint, be all there is."""
        if self._rows != rows:
            if len(rows) < len(self._rows):
                self._purged_from = self._rows[len(rows)].get("step")
            self._rows = [dict(row) for row in rows]
            self._write_rows()

    def _names(self) -> list[str]:
        return list(dict.fromkeys(name for row in self._rows for name in row))

    def _write_rows(self) -> None:
        buffer = io.StringIO(newline="")
        out = csv.DictWriter(buffer, self._names())
        out.writeheader()
        out.writerows(self._rows)
        write_text(buffer.getvalue(), self.path / "metrics.csv")

    def _read_rows(self) -> list[dict[str, Any]]:
        file = self.path / "metrics.csv"
        if not file.is_file():
            return []
        with open(file, newline="") as rows:
            return [
                {name: _number(value) for name, value in row.items() if value}
                for row in csv.DictReader(rows)
            ]

    def _tensorboard(self) -> Any:
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return None
            self._writer = SummaryWriter(
                str(self.path / "tensorboard"), purge_step=self._purged_from
            )
        return self._writer

    # Checkpoints -----------------------------------------------------------

    def save(self, content: Mapping[str, Any], number: int) -> Path:
        """Save a checkpoint of tensors and plain data, and remove old ones.

        Raises:
            OSError: if it cannot be written, as on a full disk. The checkpoints from before
                are as they were.
        """
        path = self.checkpoints / f"checkpoint_{number:09d}.pt"
        content = {"format": FORMAT, "version": VERSION, **content}
        try:
            write_plain(content, path)
        except (OSError, RuntimeError) as err:  # torch wraps what the disk says
            last = self.saved()
            kept = (
                f"The last good one is {str(last[-1])!r}"
                if last
                else "There is none yet"
            )
            raise OSError(
                f"The checkpoint {str(path)!r} could not be written ({err}). {kept}. Make room, "
                f"and go on with --resume {self.path}."
            ) from err
        for old in self.saved()[: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def saved(self) -> list[Path]:
        """The checkpoints, oldest first."""
        found = self.checkpoints.glob("checkpoint_*.pt")
        return sorted(path for path in found if _NAME.fullmatch(path.name))

    def load(self) -> dict[str, Any]:
        """The newest checkpoint.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged, somebody else's, or of a newer version.
        """
        saved = self.saved()
        if not saved:
            raise FileNotFoundError(
                f"{str(self.path)!r} has no checkpoint: the run ended before its first one. Start "
                f"it anew in another folder."
            )
        path = saved[-1]
        before = f" Remove it to go on from {saved[-2].name}." if len(saved) > 1 else ""
        try:
            content = read_plain(path, "checkpoint", "RunFolder.save(...)")
        except ValueError as err:
            raise ValueError(f"{err}{before}") from err
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{str(path)!r} is no checkpoint of a run.{before}")
        version = content.get("version")
        if not isinstance(version, int) or version > VERSION:
            raise ValueError(
                f"{str(path)!r} is of version {version!r} of the format, and this torchrl_wm "
                f"reads versions up to {VERSION}. Update torchrl_wm."
            )
        return content


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
