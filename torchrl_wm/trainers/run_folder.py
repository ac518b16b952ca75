"""The folder of a run: its settings, metrics and checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from torchrl.checkpoint import Checkpoint, CheckpointError, CheckpointRotation
from torchrl.record.loggers import Logger

from torchrl_wm._files import write_text
from torchrl_wm.trainers.checkpoints import (
    KEEP,
    make_checkpoint,
    MisfitError,
    ReplayAdapter,
)
from torchrl_wm.trainers.loggers import check_loggers, make_loggers, MetricsTable

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

#: Increased with each change that an older version cannot read.
VERSION = 2

_NAME = re.compile(r"checkpoint-(\d+)")


class RunFolder:
    """A folder with all that a run writes.

    ========================  ==================================================
    file                      what
    ========================  ==================================================
    ``config.json``           the resolved settings
    ``metrics.csv``           a row for each episode or evaluation
    ``tensorboard/``          the same as curves, with other loggers their files
    ``checkpoints/``          the last checkpoints, read without running code
    ``replay/``               the transitions, which checkpoints append
    ========================  ==================================================

    Make a new folder with :meth:`create`, and open an existing one with :meth:`open`.

    Args:
        path: the folder.

    Examples:
        >>> import tempfile
        >>> from torchrl_wm.trainers import RunFolder
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = RunFolder.create(folder + "/run", {"algorithm": "pets"})
        ...     run.log({"step": 200, "return": -1200.0})
        ...     again = RunFolder.open(folder + "/run")
        ...     again.config["algorithm"], again.saved(), again.metrics()
        ('pets', [], [{'step': 200, 'return': -1200.0}])
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = {}
        self._table: MetricsTable | None = None
        self._loggers: list[Logger] | None = None
        self._filmless: set[str] = set()
        self._purged_from: int | None = None
        self._locked: TextIO | None = None
        self._checkpoint = Checkpoint()
        self._replay: list[ReplayAdapter] = []
        self._loaded_step: int | None = None

    @staticmethod
    def check_free(path: str | os.PathLike) -> None:
        """Refuse a folder that is not empty.

        Raises:
            FileExistsError: if the folder is not empty.
        """
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(
                f"{str(path)!r} exists already. If it is a run, go on with it by --resume {path} "
                f"(in Python: resume_run({str(path)!r})); or remove it, or choose another folder."
            )

    @classmethod
    def create(cls, path: str | os.PathLike, config: Mapping[str, Any]) -> RunFolder:
        """Make a new folder.

        Raises:
            FileExistsError: if the folder is not empty.
        """
        cls.check_free(path)
        run = cls(path)
        run.checkpoints.mkdir(parents=True)
        run.config = {"version": VERSION, "id": uuid.uuid4().hex[:12], **config}
        run.write_config()
        return run

    @classmethod
    def open(cls, path: str | os.PathLike) -> RunFolder:
        """Open the folder of a run.

        Raises:
            FileNotFoundError: if it is not the folder of a run.
            ValueError: if its settings cannot be read, or another version wrote them.
        """
        run = cls(path)
        file = run.path / "config.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"{str(run.path)!r} is not the folder of a run: it has no config.json."
            )
        try:
            run.config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as err:
            raise ValueError(f"{str(file)!r} is damaged: {err}") from err
        version = run.config.get("version", 1) if isinstance(run.config, dict) else None
        if version == 1:
            raise ValueError(
                f"{str(run.path)!r} is a run of an earlier torchrl_wm (format 1), whose checkpoints "
                f"this one does not read (format {VERSION}). Look at it with the version that made "
                f"it, or start a new run; its metrics.csv can be read as it is."
            )
        if version != VERSION:
            raise ValueError(
                f"{str(run.path)!r} is of the format {version!r}, and this torchrl_wm reads format "
                f"{VERSION}. Update torchrl_wm."
            )
        return run

    def write_config(self) -> None:
        """Write the settings, as they are now."""
        text = json.dumps(self.config, indent=2)
        write_text(text + "\n", self.path / "config.json")

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def size(self) -> int:
        """The bytes of all that is in the folder."""
        files = (file for file in self.path.rglob("*") if file.is_file())
        return sum(file.stat().st_size for file in files)

    # Metrics ---------------------------------------------------------------

    @property
    def table(self) -> MetricsTable:
        """The rows of ``metrics.csv``."""
        if self._table is None:
            self._table = MetricsTable(self.path)
        return self._table

    @property
    def loggers(self) -> list[Logger]:
        """The table and the loggers that the settings name."""
        if self._loggers is None:
            names, run_id = self._logger_names, self.config["id"]
            others = make_loggers(names, self.path, run_id, self._purged_from)
            self._loggers = [self.table, *others]
        return self._loggers

    @property
    def _logger_names(self) -> list[str]:
        return self.config.get("config", {}).get("logger", ())

    def close(self) -> None:
        """Write out what loggers buffer; the next row opens them again."""
        for logger in self._loggers or ():
            if logger is not self.table:
                logger.close()
        self._loggers, self._purged_from = None, None
        if self._locked is not None:
            self._locked.close()
            self._locked = None

    def _lock(self) -> None:
        """Keep other processes from writing into the folder until this process closes it, or ends.

        Raises:
            RuntimeError: if another process writes into it.
        """
        # Windows has no such locks.
        if fcntl is None or self._locked is not None:
            return
        file = open(self.path / ".lock", "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            file.seek(0)
            process = file.read().strip() or "another one"
            file.close()
            raise RuntimeError(
                f"The run in {str(self.path)!r} is going on in process {process}. Wait for its end, "
                f"or stop it first."
            ) from err
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self._locked = file

    def log(self, row: Mapping[str, Any]) -> None:
        """Give a row of numbers to all loggers; ``step`` is its place in curves."""
        values = {name: value for name, value in row.items() if name != "step"}
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
        for logger in self.loggers:
            logger.log_metrics(
                values if logger is self.table else numbers, step=row.get("step")
            )
            logger.flush()

    def log_film(
        self, name: str, frames: torch.Tensor, step: int, fps: float = 20
    ) -> None:
        """Give a film, uint8 ``[T, height, width, 3]``, to all loggers that can take one.

        If a logger cannot take films, a warning says so once.
        """
        video = frames.permute(0, 3, 1, 2).unsqueeze(0)
        for logger in self.loggers:
            kind = type(logger).__name__
            if kind in self._filmless:
                continue
            try:
                logger.log_video(name, video, step=step, fps=fps)
            except (ImportError, NotImplementedError) as err:
                self._filmless.add(kind)
                warnings.warn(f"{kind} gets no films: {err}", stacklevel=2)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the rows so far; each has only the values that it was logged with."""
        return [dict(row) for row in self.table.rows]

    def restore(self, rows: list[dict[str, Any]]) -> None:
        """Replace the rows by those of a checkpoint."""
        if len(rows) < len(self.table.rows):
            self._purged_from = self.table.rows[len(rows)].get("step")
        self.table.restore(rows)

    # Checkpoints -----------------------------------------------------------

    def bind(self, parts: Mapping[str, Any]) -> None:
        """Set the parts that checkpoints hold.

        Args:
            parts: by name; each with a ``state_dict`` of tensors and plain data, or a replay
                buffer.
        """
        self._checkpoint, self._replay = make_checkpoint(parts, self.path / "replay")

    def save(self, step: int) -> Path:
        """Save a checkpoint of the parts, and remove old ones.

        Args:
            step: the number of the checkpoint.

        Raises:
            OSError: if it cannot be written, as on a full disk. Earlier checkpoints are not
                changed.
        """
        rotation = CheckpointRotation(self.checkpoints, keep_last=KEEP)
        try:
            path = rotation.save(self._checkpoint, step=step)
        except (OSError, RuntimeError) as err:  # torch wraps errors of the disk
            last = self.saved()
            kept = (
                f"The last good one is {str(last[-1])!r}"
                if last
                else "There is none yet"
            )
            raise OSError(
                f"The checkpoint of step {step} could not be written ({err}). {kept}. Make room, "
                f"and go on with --resume {self.path}."
            ) from err
        return path

    def saved(self) -> list[Path]:
        """Return the checkpoints, oldest first."""
        found = self.checkpoints.glob("checkpoint-*")
        return sorted(path for path in found if _NAME.fullmatch(path.name))

    def has(self, step: int) -> bool:
        """Return whether there is a checkpoint of a step."""
        return any(step_of(path) == step for path in self.saved())

    def load(self, step: int | None = None) -> None:
        """Load a checkpoint into the parts. The folder is not changed.

        Args:
            step: the number of the checkpoint; the newest one if None.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged, of another version, or does not fit the parts.
        """
        path = self._choose(step)
        try:
            self._checkpoint.load(path, map_location="cpu")
        except (AttributeError, CheckpointError, KeyError, OSError, ValueError) as err:
            raise ValueError(self._why_not(path, err)) from err
        self._loaded_step = step_of(path)

    def go_on(self) -> None:
        """Remove what came after the checkpoint that was loaded, or all if none was.

        This is called before a run writes into its folder again.
        """
        check_loggers(self._logger_names)
        self._lock()
        self.write_config()  # the run may end later now
        last = -1 if self._loaded_step is None else self._loaded_step
        for path in self.saved():
            if step_of(path) > last:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        # Files that a kill while writing left.
        for left in self.checkpoints.glob(".checkpoint-*"):
            shutil.rmtree(left, ignore_errors=True)
        for name in ("config.json", "metrics.csv"):
            for left in self.path.glob(f".{name}.*"):
                left.unlink()
        for adapter in self._replay:
            adapter.drop_later()
        if self._loaded_step is None:
            shutil.rmtree(self.path / "replay", ignore_errors=True)

    def _choose(self, step: int | None) -> Path:
        saved = self.saved()
        if not saved:
            raise FileNotFoundError(
                f"{str(self.path)!r} has no checkpoint yet: the run ended before its first one. "
                f"--resume {self.path} begins it again."
            )
        if step is None:
            return saved[-1]
        for path in saved:
            if step_of(path) == step:
                return path
        raise FileNotFoundError(
            f"{str(self.path)!r} has no checkpoint of step {step}; there are "
            f"{[step_of(path) for path in saved]}."
        )

    def _why_not(self, path: Path, err: Exception) -> str:
        """Say what is wrong with a checkpoint."""
        if "Unsupported newer" in str(err):
            return f"{str(path)!r} is of a newer version. Update torchrl_wm and torchrl. ({err})"
        cause, result = err.__cause__, getattr(err, "result", None)
        reason = cause if isinstance(cause, MisfitError) else None
        if result is not None and (
            result.missing or result.incompatible and cause is None
        ):
            reason = reason or err
        if reason is not None:
            return (
                f"The checkpoint in {str(self.path)!r} does not fit the run's config and env "
                f"({reason}). Give the env and the functions that the run began with "
                f"(resume_run(path, env=...)), and config.json as it was."
            )
        steps = [step_of(other) for other in self.saved()]
        before = [step for step in steps if step < step_of(path)]
        instead = ""
        if before:
            instead = (
                f" Go on from the one before: --checkpoint {before[-1]} (in Python: "
                f"checkpoint={before[-1]})."
            )
        return f"The checkpoint {str(path)!r} is damaged ({err}).{instead}"


def step_of(path: Path) -> int:
    """Return the number of a checkpoint."""
    return int(_NAME.fullmatch(path.name)[1])
