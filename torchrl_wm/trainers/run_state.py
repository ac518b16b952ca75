"""Parts of a checkpoint beside those of the recipe: random states, counts and losses."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torchrl.checkpoint import GlobalRNGState


class RandomState:
    """The global random states as a part of a checkpoint; they are set when a run goes on."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the states as they are now."""
        return GlobalRNGState().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states of a checkpoint."""
        self._loaded = state_dict

    def restore(self) -> None:
        """Set the states that were loaded, if any were."""
        if self._loaded is not None:
            # A run may go on without its GPUs, or with fewer.
            on_gpus = self._loaded.pop("torch_cuda", [])[: torch.cuda.device_count()]
            if on_gpus:
                self._loaded["torch_cuda"] = on_gpus
            GlobalRNGState().load_state_dict(self._loaded)
            self._loaded = None


class TrainerState:
    """The state of a run's trainer as a part of a checkpoint.

    Args:
        trainer: a :class:`~torchrl_wm.trainers.RecipeTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, and the losses for the next row of the metrics."""
        trainer = self._trainer
        losses = {
            name: value.detach().cpu() if isinstance(value, torch.Tensor) else value
            for name, value in trainer._losses.items()
        }
        return {
            "recipe": trainer.recipe.name,
            "collected_frames": trainer.collected_frames,
            "episodes": trainer.episodes,
            "seconds": trainer.seconds,
            # The rows themselves are in metrics.csv: a checkpoint does not grow with the run.
            "rows": len(trainer.metrics),
            "losses": losses,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, and the rows of the metrics up to then."""
        trainer = self._trainer
        if state_dict["recipe"] != trainer.recipe.name:
            raise ValueError(
                f"it is one of {state_dict['recipe']!r}, and this is {trainer.recipe.name!r}"
            )
        rows = trainer.run.metrics()
        if len(rows) < state_dict["rows"]:
            raise ValueError(
                f"metrics.csv has {len(rows)} rows, and had {state_dict['rows']} when it was saved; "
                f"put the file back as the run wrote it"
            )
        trainer.metrics = rows[: state_dict["rows"]]
        trainer.collected_frames = state_dict["collected_frames"]
        trainer.episodes = state_dict["episodes"]
        trainer.seconds = state_dict["seconds"]
        trainer._losses = dict(state_dict["losses"])


def seed_all(seed: int) -> None:
    """Seed all random states that a recipe may draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
