"""The files of exported policies: how they are written and run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.export import ExportedProgram

from torchrl_wm.trainers.exporting.check import Runner
from torchrl_wm.trainers.exporting.program import PolicyProgram

#: The forms of exported policies.
FORMATS = ("pt2", "onnx")
#: What ONNX needs.
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def missing_for_onnx() -> list[str]:
    """Return the packages that ONNX needs and that are not installed."""
    return [name for name in _PACKAGES if not find_spec(name)]


def checked_formats(formats: Sequence[str] | None) -> list[str]:
    """Return the formats, each once."""
    missing = missing_for_onnx()
    if formats is None:
        return ["pt2"] if missing else list(FORMATS)
    formats = [formats] if isinstance(formats, str) else list(dict.fromkeys(formats))
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ValueError(f"formats are among {list(FORMATS)}, got {formats}.")
    if "onnx" in formats and missing:
        raise ImportError(
            f"A policy as ONNX needs {', '.join(missing)}: pip install 'torchrl-wm[export]'. "
            f"formats=['pt2'] needs torch alone."
        )
    return formats


def _write_pt2(made: ExportedProgram, program: PolicyProgram, path: Path) -> None:
    torch.export.save(made, path)


def _load_pt2(path: Path) -> Runner:
    return torch.export.load(path).module()


def _write_onnx(made: ExportedProgram, program: PolicyProgram, path: Path) -> None:
    with _quiet():
        torch.onnx.export(
            made,
            (),
            str(path),
            input_names=[port.name for port in program.inputs],
            output_names=program.outputs,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def _load_onnx(path: Path) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(path), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        arrays = {name: value.numpy() for name, value in inputs.items()}
        values = session.run(None, arrays)
        return {name: torch.from_numpy(v) for name, v in zip(names, values)}

    return run


#: The functions that write and read a program, by format.
WRITERS = {"pt2": _write_pt2, "onnx": _write_onnx}
LOADERS = {"pt2": _load_pt2, "onnx": _load_onnx}


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what torch says of packages that it does without, and of its own future."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
