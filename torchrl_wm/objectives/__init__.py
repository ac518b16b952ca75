"""What trains a world model: one loss and its terms."""

from __future__ import annotations

from torchrl_wm.objectives.terms import (
    DoneTerm,
    LatentTerm,
    LossTerm,
    ReconstructionTerm,
    RewardTerm,
)
from torchrl_wm.objectives.world_model_loss import WorldModelLoss

__all__ = [
    "DoneTerm",
    "LatentTerm",
    "LossTerm",
    "ReconstructionTerm",
    "RewardTerm",
    "WorldModelLoss",
]
