"""The training of a world model: one loss and its terms."""

from __future__ import annotations

from torchrl_wm.objectives.consistency import ConsistencyTerm

from torchrl_wm.objectives.diffusion import DenoisingTerm
from torchrl_wm.objectives.embedding import ProbeTerm, SIGRegTerm, VICRegTerm
from torchrl_wm.objectives.gaussian import (
    bootstrap_counts,
    gaussian_nll,
    GaussianNLLTerm,
)
from torchrl_wm.objectives.imagined_values import ImaginedValueLoss
from torchrl_wm.objectives.keys import LossKeys
from torchrl_wm.objectives.kl import KLTerm
from torchrl_wm.objectives.observation import ObservationTerm
from torchrl_wm.objectives.policy import PolicyPriorLoss, ValueScale
from torchrl_wm.objectives.processes import Processes
from torchrl_wm.objectives.terms import (
    DoneTerm,
    LatentTerm,
    LossContext,
    LossTerm,
    ReconstructionTerm,
    RewardTerm,
)
from torchrl_wm.objectives.two_hot import TwoHotTerm
from torchrl_wm.objectives.value import ValueTerm
from torchrl_wm.objectives.world_model_loss import WorldModelLoss

__all__ = [
    "ConsistencyTerm",
    "DenoisingTerm",
    "DoneTerm",
    "GaussianNLLTerm",
    "ImaginedValueLoss",
    "KLTerm",
    "LatentTerm",
    "LossContext",
    "LossKeys",
    "LossTerm",
    "ObservationTerm",
    "PolicyPriorLoss",
    "ProbeTerm",
    "Processes",
    "ReconstructionTerm",
    "RewardTerm",
    "SIGRegTerm",
    "TwoHotTerm",
    "VICRegTerm",
    "ValueScale",
    "ValueTerm",
    "WorldModelLoss",
    "bootstrap_counts",
    "gaussian_nll",
]
