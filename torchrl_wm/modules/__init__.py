"""What predicts: the world model and its blocks."""

from __future__ import annotations

from torchrl_wm.modules.world_model import WorldModel

__all__ = ["WorldModel"]
