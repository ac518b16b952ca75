"""Prediction: the world model and its blocks.

- ``world_model/``: :class:`WorldModel`, what it does with its components, and how it filters
  observations over time. Its docstring has a line for each file.
- ``blocks/``: modules that the components can be made of; likewise.
- ``keys.py``: nested keys; ``errors.py``: the error of a missing entry; ``modes.py``: evaluation
  mode; ``integrity.py``: whether a model still has the modules of its builder.
"""

from __future__ import annotations

from torchrl_wm.modules.blocks.activations import Mish
from torchrl_wm.modules.blocks.attention import CausalTransformer
from torchrl_wm.modules.blocks.data_limit import data_limit
from torchrl_wm.modules.blocks.diffusion import (
    Denoiser,
    DiffusionSampler,
    draw_sigma,
    karras_sigmas,
    preconditioning,
)
from torchrl_wm.modules.blocks.diffusion_dynamics import DiffusionDynamics, FrameModel
from torchrl_wm.modules.blocks.diffusion_networks import (
    DenoiserMLP,
    DenoiserUNet,
    ImageFeatures,
)
from torchrl_wm.modules.blocks.ensemble import (
    DrawnMember,
    EnsembleLinear,
    EnsembleMLP,
    GaussianEnsemble,
)
from torchrl_wm.modules.blocks.ensemble_dynamics import EnsembleDynamics
from torchrl_wm.modules.blocks.entries import Entry, JoinEntries, SplitEntries
from torchrl_wm.modules.blocks.gaussian import BoundedLogVar
from torchrl_wm.modules.blocks.heads import (
    ContinueHead,
    FunctionHead,
    GaussianHead,
    TerminationHead,
)
from torchrl_wm.modules.blocks.latent import NormedLinear, NormedMLP, SimNorm
from torchrl_wm.modules.blocks.normalizer import (
    DenormalizedNetwork,
    fit_normalizers,
    NormalizedNetwork,
    Normalizer,
)
from torchrl_wm.modules.blocks.penalty import penalty_of, with_penalty, without_penalty
from torchrl_wm.modules.blocks.penalty_heads import Penalty
from torchrl_wm.modules.blocks.pixels import PixelDecoder, PixelEncoder
from torchrl_wm.modules.blocks.propagation import SampleMember, with_propagation
from torchrl_wm.modules.blocks.q_ensemble import QEnsemble
from torchrl_wm.modules.blocks.rssm import (
    ContinuationModel,
    RSSMDynamics,
    RSSMPosteriorHead,
)
from torchrl_wm.modules.blocks.shift import random_shift
from torchrl_wm.modules.blocks.transition_lstm import TransitionLSTM
from torchrl_wm.modules.blocks.two_hot import SymlogTwoHot, TwoHotHead
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.world_model.initial_state import InitialState
from torchrl_wm.modules.world_model.memory import write_memory
from torchrl_wm.modules.world_model.observer import memory_apart, Observer
from torchrl_wm.modules.world_model.sequence_pass import check_sequence
from torchrl_wm.modules.world_model.world_model import WorldModel

__all__ = [
    "BoundedLogVar",
    "CausalTransformer",
    "ContinuationModel",
    "ContinueHead",
    "Denoiser",
    "DenoiserMLP",
    "DenoiserUNet",
    "DenormalizedNetwork",
    "DiffusionDynamics",
    "DiffusionSampler",
    "DrawnMember",
    "EnsembleDynamics",
    "EnsembleLinear",
    "EnsembleMLP",
    "Entry",
    "FrameModel",
    "FunctionHead",
    "GaussianEnsemble",
    "GaussianHead",
    "ImageFeatures",
    "InitialState",
    "JoinEntries",
    "Mish",
    "MissingEntryError",
    "NormalizedNetwork",
    "Normalizer",
    "NormedLinear",
    "NormedMLP",
    "Observer",
    "Penalty",
    "PixelDecoder",
    "PixelEncoder",
    "QEnsemble",
    "RSSMDynamics",
    "RSSMPosteriorHead",
    "SampleMember",
    "SimNorm",
    "SplitEntries",
    "SymlogTwoHot",
    "TerminationHead",
    "TransitionLSTM",
    "TwoHotHead",
    "WorldModel",
    "check_sequence",
    "data_limit",
    "draw_sigma",
    "fit_normalizers",
    "karras_sigmas",
    "memory_apart",
    "penalty_of",
    "preconditioning",
    "random_shift",
    "with_penalty",
    "with_propagation",
    "without_penalty",
    "write_memory",
]
