"""The policy of a run as files that need neither this package nor TorchRL."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase
from torchrl.modules import MPCPlannerBase

from torchrl_wm.modules import Observer
from torchrl_wm.modules.modes import evaluation_mode
from torchrl_wm.trainers.evaluation import forked_random
from torchrl_wm.trainers.exporting.check import deviation, record, RecordedStep, Runner
from torchrl_wm.trainers.exporting.description import described_policy
from torchrl_wm.trainers.exporting.formats import checked_formats, LOADERS, WRITERS
from torchrl_wm.trainers.exporting.program import PolicyProgram
from torchrl_wm.trainers.exporting.tracing import exported
from torchrl_wm.trainers.policies import Policy
from torchrl_wm.trainers.policy_copies import copied_policy
from torchrl_wm.trainers.runs import resume_run
from torchrl_wm.trainers.settings import AtLeast
from torchrl_wm.trainers.trainer import RecipeTrainer

#: The largest deviation from the run's own actions.
TOLERANCE = 1e-5


class DeviationError(ValueError):
    """An exported policy does not act as the run does."""


@dataclass(frozen=True)
class ExportedPolicy:
    """The files of an exported policy.

    Args:
        folder: where they are.
        files: the files, by format, and "json", which describes inputs and outputs.
        deviations: the largest difference of actions from those of the run's own ``act``, by
            format.
        described: the content of ``policy.json``.
    """

    folder: Path
    files: dict[str, Path]
    deviations: dict[str, float]
    described: dict[str, Any]


def export_policy(
    run: str | os.PathLike | RecipeTrainer,
    folder: str | os.PathLike | None = None,
    *,
    formats: Sequence[str] | None = None,
    policy: str = "policy",
    steps: int = 100,
    seed: int = 0,
    checkpoint: int | None = None,
    **given: Any,
) -> ExportedPolicy:
    """Write the policy of a run as programs that need neither this package nor TorchRL.

    A program maps tensors by name, ``[B, ...]`` each, to tensors by name: observations as the
    real env returns them to actions as it takes them. What the run does between the two is
    inside: normalisation, the filter of a recurrent model, the squashing of actions. What a
    policy carries from step to step are inputs and outputs; the input ``is_init`` says where
    episodes begin, and what is carried does not matter there. Random numbers that evaluations
    draw are inputs, too.

    Each program is read again, and compared with the run's own
    :meth:`~torchrl_wm.trainers.Policy.act` on observations of its real env, or of held-out
    episodes of its log if it has none, before any file is left behind.

    Args:
        run: the run, or its folder, which is not changed but for the files.
        folder: where the files are written, over older ones of the same format; ``export`` in the
            run's folder by default.

    Keyword Args:
        formats: "pt2", a ``torch.export`` program, and "onnx"; by default both, or pt2 alone
            where the packages of the extra ``export`` are missing.
        policy: which policy: that of evaluations, or another one that the recipe has. TD-MPC2's
            "prior" acts without a plan.
        steps: how many steps the programs are compared on.
        seed: the seed of how these begin.
        checkpoint: the step of the checkpoint, for a folder; the newest one by default.
        given: the objects that the run of a folder was started with from Python: an env,
            functions.

    Returns:
        The files, and the deviations.

    Raises:
        ImportError: if ONNX is asked for, and a package that it needs is missing.
        ValueError: if the run has no such policy, or it plans; if torch cannot export it; if
            ``steps`` is below 1.
        DeviationError: if a program acts otherwise than the run, by more than 1e-5.

    Examples:
        >>> import tempfile, torch
        >>> from torchrl_wm.trainers import export_policy, MBPOTrainer
        >>> trainer = MBPOTrainer(env="Pendulum-v1", device="cpu")
        >>> written = export_policy(trainer, tempfile.mkdtemp(), formats=["pt2"], steps=5)
        >>> sorted(written.files), written.deviations["pt2"] < 1e-5
        (['json', 'pt2'], True)
        >>> act = torch.export.load(written.files["pt2"]).module()
        >>> act({"observation": torch.zeros(1, 3)})["action"].shape
        torch.Size([1, 1])
    """
    formats = checked_formats(formats)
    AtLeast(1).check("steps", steps)
    if not isinstance(run, RecipeTrainer):
        with forked_random():
            run = resume_run(run, checkpoint=checkpoint, device="cpu", **given)
            if not run.run.saved():
                run.load()  # raises the error that there is none
    if folder is None and run.run is None:
        raise ValueError(
            "The run has no folder: say where to write its policy, export_policy(trainer, folder)."
        )
    folder = Path(run.run.path / "export" if folder is None else folder)
    module = _module(run, policy)
    acting = Policy(run, seed=seed, module=None if policy == "policy" else module)
    is_here = run.recipe.device.type == "cpu"
    copy = deepcopy(module) if is_here else copied_policy(module, "cpu")
    copy.requires_grad_(False)
    with evaluation_mode(copy), forked_random(seed):
        program = PolicyProgram(copy, run.env, run.recipe.evaluation_exploration)
        made = exported(program)
    recorded = record(acting, program, steps, seed)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial") as partial:
        files = {name: Path(partial, f"policy.{name}") for name in formats}
        deviations = {}
        for name, path in files.items():
            write, load = WRITERS[name], LOADERS[name]
            write(made, program, path)
            deviations[name] = _compared(name, load(path), recorded, program)
        described = described_policy(
            run, program, policy, formats, recorded, deviations
        )
        files["json"] = Path(partial, "policy.json")
        files["json"].write_text(json.dumps(described, indent=1) + "\n", "utf-8")
        for path in files.values():
            os.replace(path, folder / path.name)
    placed = {name: folder / path.name for name, path in files.items()}
    return ExportedPolicy(folder, placed, deviations, described)


def _module(trainer: RecipeTrainer, name: str) -> TensorDictModuleBase:
    """Return a policy of a run that can be exported."""
    recipe = trainer.recipe
    found = recipe.exported_policies()
    if not found:
        raise ValueError(
            f"A run of {recipe.name!r} learns no policy: there is nothing to export. A finished "
            f"run of train model has its model in model.pt: torchrl_wm.models.load_world_model."
        )
    if name not in found:
        raise ValueError(
            f"A run of {recipe.name!r} has the policies {list(found)}, and not {name!r}."
        )
    module = found[name]
    if _plans(module):
        others = [other for other, one in found.items() if not _plans(one)]
        instead = (
            f"Export one that acts without a search: policy={others[0]!r}, or --policy "
            f"{others[0]} on the command line. It acts otherwise than the plan."
            if others
            else "Act by load_policy(run).act(observation), or train a policy that needs no plan: "
            "MBPO, Dreamer, TD-MPC2."
        )
        raise ValueError(
            f"The policy of this run of {recipe.name!r} is a planner: each action is a search "
            f"through the model, by random candidates, and no fixed program. {instead}"
        )
    for part in module.modules():
        if isinstance(part, Observer) and part.world_model.memory_keys:
            raise ValueError(
                f"The policy of {recipe.name!r} filters with the memory "
                f"{list(part.world_model.memory_keys)}, which does not travel from step to step "
                f"as tensors of an exported policy do. Act by load_policy(run).act(observation)."
            )
    return module


def _plans(module: TensorDictModuleBase) -> bool:
    return any(isinstance(part, MPCPlannerBase) for part in module.modules())


def _compared(
    name: str, run: Runner, recorded: list[RecordedStep], program: PolicyProgram
) -> float:
    with torch.no_grad():
        largest = deviation(run, recorded, program)
    if largest > TOLERANCE:
        raise DeviationError(
            f"The exported policy, policy.{name}, acts otherwise than the run: its actions deviate "
            f"by {largest:.2g}, and at most {TOLERANCE:g} is allowed, in {len(recorded)} steps. No "
            f"file is left behind. A policy must compute the same for a batch as for each row, "
            f"from its entries alone."
        )
    return largest
