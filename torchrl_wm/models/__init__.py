"""Ready-made world models, each with its loss, from an env's specs."""

from __future__ import annotations

from torchrl_wm.models.ensemble import EnsembleConfig, make_ensemble_world_model
from torchrl_wm.models.specs import EnvSpecs, PixelEntry, read_specs

__all__ = [
    "EnsembleConfig",
    "EnvSpecs",
    "PixelEntry",
    "make_ensemble_world_model",
    "read_specs",
]
