"""World models in TorchRL's Trainer."""

from __future__ import annotations

from torchrl_wm.trainers.imagined_replay import ImaginedReplayHook

__all__ = ["ImaginedReplayHook"]
