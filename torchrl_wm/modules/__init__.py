"""What predicts: the world model and its blocks."""

from __future__ import annotations

from torchrl_wm.modules.entries import Entry, JoinEntries, SplitEntries
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.initial_state import InitialState
from torchrl_wm.modules.observer import Observer
from torchrl_wm.modules.world_model import WorldModel

__all__ = [
    "Entry",
    "InitialState",
    "JoinEntries",
    "MissingEntryError",
    "Observer",
    "SplitEntries",
    "WorldModel",
]
