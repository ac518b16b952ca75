"""What imagines: environments whose transitions a world model predicts."""

from __future__ import annotations

from torchrl_wm.envs.world_model_env import WorldModelEnv

__all__ = ["WorldModelEnv"]
