"""Every ready-made model in a size that takes no time: ``MAKE[name](env, **settings)``."""

from __future__ import annotations

from functools import partial

from torchrl_wm.models import (
    make_diffusion_world_model,
    make_ensemble_world_model,
    make_jepa_world_model,
    make_mlp_world_model,
    make_rssm_world_model,
    make_tdmpc2_world_model,
    make_transformer_world_model,
    RSSMConfig,
)

RSSM = {"belief_size": 16, "hidden_size": 8, "num_cells": 8, "depth": 1}
DIFFUSION = {
    "hidden": (8,),
    "noise_features": 4,
    "channels": (4, 8),
    "depths": (1, 1),
    "condition_features": 4,
    "lstm_size": 4,
    "head_channels": (4,),
    "head_depths": (1,),
}
MAKE = {
    "diffusion": partial(make_diffusion_world_model, **DIFFUSION),
    "ensemble": partial(
        make_ensemble_world_model, members=2, hidden=(8,), termination_hidden=(8,)
    ),
    "mlp": partial(make_mlp_world_model, hidden=(8,), latent_size=4),
    "jepa": partial(
        make_jepa_world_model,
        hidden=(8,),
        latent_size=4,
        projections=8,
        reward=True,
        termination="learned",
        probe=True,
    ),
    "planet": lambda env, **settings: make_rssm_world_model(
        env, RSSMConfig.planet(**RSSM), **settings
    ),
    "dreamer-v2": lambda env, **settings: make_rssm_world_model(
        env, RSSMConfig.dreamer_v2(**RSSM), **settings
    ),
    "dreamer-v3": partial(make_rssm_world_model, **RSSM),
    "tdmpc2": partial(
        make_tdmpc2_world_model, latent_size=16, num_cells=8, encoder_cells=8
    ),
    "transformer": partial(
        make_transformer_world_model,
        latent_size=8,
        tokens=2,
        width=8,
        heads=2,
        context=3,
        hidden=(8,),
    ),
}
