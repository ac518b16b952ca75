"""What predicts: the world model and its blocks."""

from __future__ import annotations

from torchrl_wm.modules.ensemble import EnsembleLinear, EnsembleMLP, GaussianEnsemble
from torchrl_wm.modules.ensemble_dynamics import (
    EnsembleDynamics,
    SampleMember,
    with_propagation,
)
from torchrl_wm.modules.entries import Entry, JoinEntries, SplitEntries
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.gaussian import BoundedLogVar
from torchrl_wm.modules.heads import (
    ContinueHead,
    FunctionHead,
    GaussianHead,
    TerminationHead,
)
from torchrl_wm.modules.initial_state import InitialState
from torchrl_wm.modules.normalizer import fit_normalizers, NormalizedNetwork, Normalizer
from torchrl_wm.modules.observer import Observer
from torchrl_wm.modules.world_model import WorldModel

__all__ = [
    "BoundedLogVar",
    "ContinueHead",
    "EnsembleDynamics",
    "EnsembleLinear",
    "EnsembleMLP",
    "Entry",
    "FunctionHead",
    "GaussianEnsemble",
    "GaussianHead",
    "InitialState",
    "JoinEntries",
    "MissingEntryError",
    "NormalizedNetwork",
    "Normalizer",
    "Observer",
    "SampleMember",
    "SplitEntries",
    "TerminationHead",
    "WorldModel",
    "fit_normalizers",
    "with_propagation",
]
