"""Runs in their folders, opened by what the folder says."""

from __future__ import annotations

from torchrl_wm.trainers import MBPOTrainer, PETSTrainer, RunFolder
from torchrl_wm.trainers.recipe import RecipeTrainer

TRAINERS: dict[str, type[RecipeTrainer]] = {
    kind.algorithm: kind for kind in (PETSTrainer, MBPOTrainer)
}


def recipe_of(path: str) -> type[RecipeTrainer]:
    """The trainer of a run's recipe.

    Raises:
        FileNotFoundError: if it is not the folder of a run.
        ValueError: if it is one of a recipe that is not known.
    """
    algorithm = RunFolder.open(path).config.get("algorithm")
    if algorithm not in TRAINERS:
        raise ValueError(
            f"{path!r} is a run of {algorithm!r}; this command serves runs of "
            f"{sorted(TRAINERS)}."
        )
    return TRAINERS[algorithm]


def open_run(path: str) -> RecipeTrainer:
    """A run at its last checkpoint, to be looked at: nothing of it is changed.

    Raises:
        FileNotFoundError: if it is not the folder of a run, or there is no checkpoint.
    """
    kind = recipe_of(path)
    if not RunFolder.open(path).saved():
        raise FileNotFoundError(
            f"{path!r} has no checkpoint yet: its first one comes at the end of an episode. "
            f"torchrl-wm train --resume {path} goes on with it."
        )
    return kind.resume(path)
