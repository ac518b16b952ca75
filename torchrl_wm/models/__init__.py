"""Ready-made world models, each with its loss, from an env's specs."""

from __future__ import annotations

from torchrl_wm.models.specs import EnvSpecs, PixelEntry, read_specs

__all__ = ["EnvSpecs", "PixelEntry", "read_specs"]
