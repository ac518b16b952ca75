"""Ready-made world models, each with its loss, from an env's specs."""

from __future__ import annotations

from torchrl_wm.models.diffusion import DiffusionConfig, make_diffusion_world_model
from torchrl_wm.models.dreamer import make_dreamer_actor_critic
from torchrl_wm.models.ensemble import EnsembleConfig, make_ensemble_world_model
from torchrl_wm.models.env_specs import EnvSpecs, PixelEntry
from torchrl_wm.models.jepa import JEPAConfig, make_jepa_world_model
from torchrl_wm.models.mlp import make_mlp_world_model, MLPConfig
from torchrl_wm.models.persistence import load_world_model, save_world_model
from torchrl_wm.models.reference import ActionEntry
from torchrl_wm.models.rssm import make_rssm_world_model, RSSMConfig
from torchrl_wm.models.specs import read_specs
from torchrl_wm.models.tdmpc2 import (
    make_tdmpc2_q_ensemble,
    make_tdmpc2_world_model,
    TDMPC2Config,
)
from torchrl_wm.models.tdmpc2_policy import make_tdmpc2_policy
from torchrl_wm.models.transformer import (
    make_transformer_world_model,
    TransformerConfig,
)

__all__ = [
    "ActionEntry",
    "DiffusionConfig",
    "EnsembleConfig",
    "EnvSpecs",
    "JEPAConfig",
    "MLPConfig",
    "PixelEntry",
    "RSSMConfig",
    "TDMPC2Config",
    "TransformerConfig",
    "load_world_model",
    "make_diffusion_world_model",
    "make_dreamer_actor_critic",
    "make_ensemble_world_model",
    "make_jepa_world_model",
    "make_mlp_world_model",
    "make_rssm_world_model",
    "make_tdmpc2_policy",
    "make_tdmpc2_q_ensemble",
    "make_tdmpc2_world_model",
    "make_transformer_world_model",
    "read_specs",
    "save_world_model",
]
