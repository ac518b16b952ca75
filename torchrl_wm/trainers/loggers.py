"""Loggers of a run's metrics: a table in its folder, and those of TorchRL."""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchrl.record.loggers import get_logger, Logger, TensorboardLogger

from torchrl_wm._files import write_text
from torchrl_wm.diagnostics import save_video
from torchrl_wm.diagnostics.video_files import gif


class MetricsTable(Logger):
    """A TorchRL logger that keeps a table, ``metrics.csv``: a row for each call of ``log_metrics``.

    Values that a row lacks are empty cells. Films are written to ``films/`` beside it.

    Args:
        folder: the folder of the run.

    Examples:
        >>> import tempfile
        >>> from torchrl_wm.trainers.loggers import MetricsTable
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table = MetricsTable(folder)
        ...     _ = table.log_metrics({"return": -1200.0, "episode": 1}, step=200)
        ...     MetricsTable(folder).rows
        [{'step': 200, 'return': -1200.0, 'episode': 1}]
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(exp_name="metrics", log_dir=str(folder))
        self._path = Path(folder) / "metrics.csv"
        #: The rows so far, each with only the values that it was logged with.
        self.rows = self._read()
        self._names = _names(self.rows)

    def log_metrics(
        self, metrics: Mapping[str, Any], step: int | None = None, **_: Any
    ) -> dict[str, Any]:
        """Append a row."""
        row = {"step": step, **metrics}
        self.rows.append(row)
        if set(row) <= set(self._names):
            with open(self._path, "a", newline="") as file:
                csv.DictWriter(file, self._names).writerow(row)
        else:
            self._names = _names([dict.fromkeys(self._names), row])
            self._write()
        return row

    def log_scalar(self, name: str, value: float, step: int | None = None) -> None:
        """Append a row of one value."""
        self.log_metrics({name: float(value)}, step)

    def log_video(
        self, name: str, video: torch.Tensor, step: int | None = None, **kwargs: Any
    ) -> None:
        """Write a film ``[1, T, 3, height, width]`` as ``films/NAME-STEP.gif``."""
        path = self._path.parent / "films" / f"{name}-{step or 0:09d}.gif"
        save_video(path, _frames(video), fps=kwargs.get("fps", 20.0))

    def log_hparams(self, cfg: Mapping[str, Any]) -> None:
        """Do nothing: config.json has the settings."""

    def log_histogram(self, name: str, data: Sequence, **kwargs: Any) -> None:
        """Refuse: a table has no place for histograms."""
        raise NotImplementedError("metrics.csv holds numbers; log scalars.")

    def restore(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace the rows by those of a checkpoint."""
        if self.rows != list(rows):
            self.rows = [dict(row) for row in rows]
            self._names = _names(self.rows)
            self._write()

    def _create_experiment(self) -> None:
        return None

    def __repr__(self) -> str:
        return f"MetricsTable({str(self._path)!r})"

    def _write(self) -> None:
        buffer = io.StringIO(newline="")
        out = csv.DictWriter(buffer, self._names)
        out.writeheader()
        out.writerows(self.rows)
        write_text(buffer.getvalue(), self._path)

    def _read(self) -> list[dict[str, Any]]:
        if not self._path.is_file():
            return []
        with open(self._path, newline="") as rows:
            found = list(csv.DictReader(rows))
        for number, row in enumerate(found, start=1):
            if None in row:  # a row that was cut off is shorter
                raise ValueError(
                    f"{str(self._path)!r} is damaged: row {number} has more values than there are "
                    f"columns."
                )
        return [{k: _number(v) for k, v in row.items() if v} for row in found]


class TensorBoard(TensorboardLogger):
    """TorchRL's logger, with films that TensorBoard shows.

    torch writes films by ``moviepy.editor``, which newer versions of moviepy lack, and reports
    that only on the terminal. These films are GIFs of Pillow.
    """

    def log_video(
        self, name: str, video: torch.Tensor, step: int | None = None, **kwargs: Any
    ) -> None:
        """Log a film ``[1, T, 3, height, width]``."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        content = gif(_frames(video), fps=kwargs.get("fps", 20.0))
        height, width = video.shape[-2:]
        image = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=content
        )
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        self.experiment.file_writer.add_summary(summary, step)


def check_loggers(names: Sequence[str]) -> None:
    """Refuse loggers whose packages are not installed.

    Raises:
        ImportError: if one is not.
    """
    for name in names:
        if name != "csv" and not find_spec(name):
            raise ImportError(
                f"The logger {name!r} needs {name}: pip install {name}. Or choose another: "
                f"logger='csv', on the command line --logger csv."
            )


def make_loggers(
    names: Sequence[str], folder: Path, run_id: str, resumed_at: int | None = None
) -> list[Logger]:
    """Return the loggers of a run beside its table.

    Args:
        names: "tensorboard", "wandb", "mlflow"; "csv" is the table.
        folder: the folder of the run.
        run_id: the id by which wandb finds a run that goes on.
        resumed_at: the step from which a run goes on; TensorBoard no longer shows later steps.
    """
    check_loggers(names)
    loggers = []
    for name in dict.fromkeys(names):
        if name == "tensorboard":
            loggers.append(_tensorboard(folder, resumed_at))
        elif name == "wandb":
            settings = {"id": run_id, "resume": "allow", "project": "torchrl_wm"}
            loggers.append(
                get_logger(name, str(folder), folder.name, wandb_kwargs=settings)
            )
        elif name == "mlflow":
            loggers.append(_mlflow(folder, run_id))
    return loggers


def _tensorboard(folder: Path, resumed_at: int | None) -> Logger:
    # Files are read in the order of their names, which tell the second, and in it no time.
    files = (folder / "tensorboard").glob("events.out.tfevents.*")
    newest = max((int(file.name.split(".")[3]) for file in files), default=0)
    while int(time.time()) == newest:
        time.sleep(0.01)
    logger = TensorBoard("tensorboard", str(folder))
    if resumed_at is not None:
        from torch.utils.tensorboard import SummaryWriter

        logger.experiment.close()
        logger.experiment = SummaryWriter(logger.log_dir, purge_step=resumed_at)
    return logger


def _frames(video: torch.Tensor) -> np.ndarray:
    """Return a film ``[1, T, 3, height, width]`` as ``[T, height, width, 3]``."""
    return video[0].permute(0, 2, 3, 1).numpy()


def _mlflow(folder: Path, run_id: str) -> Logger:
    import mlflow
    from torchrl.record.loggers.mlflow import MLFlowLogger

    # mlflow needs a database: it no longer serves plain files.
    database = f"sqlite:///{folder.resolve() / 'mlflow.db'}"
    artifacts = (folder.resolve() / "mlflow").as_uri()
    mlflow.set_tracking_uri(database)
    # The database holds only this run, which goes on if it has begun.
    experiment = mlflow.get_experiment_by_name(folder.name)
    if experiment is not None:
        ids = [experiment.experiment_id]
        begun = mlflow.search_runs(ids, max_results=1, output_format="list")
        if begun:
            os.environ["MLFLOW_RUN_ID"] = begun[0].info.run_id  # read by start_run
    tags = {"torchrl_wm_run": run_id}
    logger = MLFlowLogger(folder.name, database, tags, artifact_location=artifacts)
    # TorchRL's close leaves the run open, and no other run can begin.
    logger.close = mlflow.end_run
    return logger


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns of a table."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
