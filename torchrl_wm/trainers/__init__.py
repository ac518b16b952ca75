"""World models in TorchRL's Trainer: hooks, and whole recipes."""

from __future__ import annotations

from torchrl_wm.trainers.episode_seeds import EpisodeSeeds
from torchrl_wm.trainers.evaluation import episode_return, run_episodes
from torchrl_wm.trainers.imagined_replay import ImaginedReplayHook
from torchrl_wm.trainers.learning import ModelLearner, NonFiniteLossError
from torchrl_wm.trainers.mbpo import MBPOConfig, MBPOTrainer
from torchrl_wm.trainers.pets import PETSConfig, PETSTrainer
from torchrl_wm.trainers.real_envs import make_real_env
from torchrl_wm.trainers.run_folder import RunFolder

__all__ = [
    "EpisodeSeeds",
    "ImaginedReplayHook",
    "MBPOConfig",
    "MBPOTrainer",
    "ModelLearner",
    "NonFiniteLossError",
    "PETSConfig",
    "PETSTrainer",
    "RunFolder",
    "episode_return",
    "make_real_env",
    "run_episodes",
]
