"""``torchrl-wm export``: take a policy home."""

from __future__ import annotations

from torchrl_wm.cli.console import complain, list_paths, say
from torchrl_wm.cli.open_run import check_saved
from torchrl_wm.trainers import export_policy
from torchrl_wm.trainers.exporting.formats import FORMATS, missing_for_onnx
from torchrl_wm.trainers.exporting.policies import TOLERANCE
from torchrl_wm.trainers.settings import AtLeast


def export(
    path: str,
    *,
    out: str | None,
    format: str,
    policy: str,
    steps: int,
    seed: int,
    checkpoint: int | None,
) -> None:
    """Write the policy, and say how far it is from the run's own."""
    AtLeast(1).check("--steps", steps)
    check_saved(path)
    missing = missing_for_onnx()
    if format == "auto" and missing:
        complain(
            f"Without ONNX, which needs {', '.join(missing)}: pip install 'torchrl-wm[export]'."
        )
    formats = {"auto": None, "both": FORMATS}.get(format, [format])
    written = export_policy(
        path,
        out,
        formats=formats,
        policy=policy,
        steps=steps,
        seed=seed,
        checkpoint=checkpoint,
    )
    list_paths(written.files)
    for name, largest in written.deviations.items():
        say(
            f"{name}: the actions of {steps} real steps deviate from the run's by at most "
            f"{largest:.1e} ({TOLERANCE:g} is allowed)."
        )
    for port in written.described["inputs"]:
        say(f"  in   {port['name']:14} {_form(port)}")
    for port in written.described["outputs"]:
        say(f"  out  {port['name']:14} {_form(port)}")


def _form(port: dict) -> str:
    """Return the shape, the dtype, the kind and the form of an input or output."""
    shape = ", ".join(map(str, port["shape"]))
    form = f": {port['form']}" if "form" in port else ""
    return f"[{shape}] {port['dtype']}, {port['kind']}{form}"
