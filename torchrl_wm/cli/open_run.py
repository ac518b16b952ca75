"""Open runs from their folders, and find folders for new ones."""

from __future__ import annotations

from pathlib import Path

from torchrl_wm.trainers import RecipeTrainer, resume_run, RunFolder


def open_run(path: str, checkpoint: int | None = None) -> RecipeTrainer:
    """Return a run at a checkpoint, to be inspected; its folder is not changed.

    Raises:
        FileNotFoundError: if the folder is not one of a run, or has no checkpoint.
    """
    check_saved(path)
    # A run can be inspected on another device than it was trained on.
    return resume_run(path, checkpoint=checkpoint, device="auto")


def check_saved(path: str) -> None:
    """Refuse a folder without a checkpoint.

    Raises:
        FileNotFoundError: if the folder is not one of a run, or has no checkpoint.
    """
    if not RunFolder.open(path).saved():
        raise FileNotFoundError(
            f"{path!r} has no checkpoint yet: its first one comes at the end of an episode. "
            f"torchrl-wm train --resume {path} goes on with it."
        )


def free(path: Path) -> Path:
    """Return the path, with the first free number after it if the path exists."""
    number, found = 1, path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found
