"""What an exported policy says of itself: inputs, outputs, and where it is from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from torchrl_wm.modules.keys import as_tuple
from torchrl_wm.trainers.exporting.check import RecordedStep
from torchrl_wm.trainers.exporting.program import PolicyProgram, Port
from torchrl_wm.trainers.policies import repeats
from torchrl_wm.trainers.trainer import RecipeTrainer


def described_policy(
    trainer: RecipeTrainer,
    program: PolicyProgram,
    policy: str,
    formats: Sequence[str],
    recorded: list[RecordedStep],
    deviations: Mapping[str, float],
) -> dict[str, Any]:
    """Return the content of ``policy.json``."""
    around, action = program.surroundings, recorded[0].action
    form = around.action_form
    low, high = form.bounds()
    out = [
        {
            "name": "action",
            "kind": "action",
            "shape": ["N", *action.shape],
            "dtype": str(action.dtype),
            "form": form.described,
            "entry": form.entry,
            "low": _plain(low),
            "high": _plain(high),
        }
    ]
    for port in program.inputs:
        if port.name in program.carried:
            carried = {"name": program.carried[port.name], "kind": "carried"}
            out.append({**carried, **_shape(port)})
    return {
        "recipe": trainer.recipe.name,
        "env": trainer.config.about,
        "policy": policy,
        "steps": trainer.collected_frames,
        "files": {name: f"policy.{name}" for name in formats},
        "inputs": [_input(port) for port in program.inputs],
        "outputs": out,
        "carried": program.carried,
        "action_repeat": repeats(trainer.env),
        "transforms": {"inside": around.inside, "outside": around.outside},
        "check": {"steps": len(recorded), "largest_deviation": dict(deviations)},
        "versions": {
            name: version(name)
            for name in ("torch", "torchrl", "tensordict", "torchrl-wm")
        },
    }


#: What a draw is, by its kind.
_DRAWS = {
    "uniform": "new random numbers in [0, 1) at each step",
    "normal": "new standard normal random numbers at each step",
}


def _input(port: Port) -> dict[str, Any]:
    content = {"name": port.name, "kind": port.kind, **_shape(port)}
    if port.key is not None:
        content["key"] = list(as_tuple(port.key))
    if port.kind == "observation":
        content["low"], content["high"] = (_plain(bound) for bound in port.bounds)
    if port.kind in _DRAWS:
        content["form"] = _DRAWS[port.kind]
    return content


def _shape(port: Port) -> dict[str, Any]:
    return {"shape": ["N", *port.shape], "dtype": str(port.dtype).split(".")[-1]}


def _plain(bound: Any) -> Any:
    """Return a bound as JSON has it: one number where all are the same, None for infinity."""
    if bound is None:
        return None
    values = np.asarray(bound)
    if values.size and (values == values.flat[0]).all():
        values = values.flat[0]
    found = np.where(np.isfinite(values), values, None)
    return found.tolist()
