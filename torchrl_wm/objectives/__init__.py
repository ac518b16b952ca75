"""What trains a world model: one loss and its terms."""

from __future__ import annotations

from torchrl_wm.objectives.gaussian import (
    bootstrap_counts,
    gaussian_nll,
    GaussianNLLTerm,
)
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
    "GaussianNLLTerm",
    "LatentTerm",
    "LossTerm",
    "ReconstructionTerm",
    "RewardTerm",
    "WorldModelLoss",
    "bootstrap_counts",
    "gaussian_nll",
]
