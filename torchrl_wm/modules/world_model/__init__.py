"""What a world model is: its components, how they are wired, and how they run over time."""

from __future__ import annotations

from torchrl_wm.modules.world_model.initial_state import InitialState
from torchrl_wm.modules.world_model.observer import Observer
from torchrl_wm.modules.world_model.world_model import WorldModel

__all__ = ["InitialState", "Observer", "WorldModel"]
