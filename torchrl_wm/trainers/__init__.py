"""World models in TorchRL's Trainer: hooks, and whole recipes."""

from __future__ import annotations

from torchrl_wm.trainers.episode_seeds import EpisodeSeeds
from torchrl_wm.trainers.evaluation import episode_return, run_episodes
from torchrl_wm.trainers.imagined_replay import ImaginedReplayHook
from torchrl_wm.trainers.learning import ModelLearner, NonFiniteLossError
from torchrl_wm.trainers.logged_data import load_transitions
from torchrl_wm.trainers.mbpo import MBPOConfig, MBPOTrainer
from torchrl_wm.trainers.model_training import RecordedEnv, train_world_model
from torchrl_wm.trainers.pets import PETSConfig, PETSTrainer
from torchrl_wm.trainers.pictures import (
    film_policy,
    plot_learning_curve,
    save_prediction_fan,
    write_run_report,
)
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
    "RecordedEnv",
    "RunFolder",
    "episode_return",
    "film_policy",
    "load_transitions",
    "make_real_env",
    "plot_learning_curve",
    "run_episodes",
    "save_prediction_fan",
    "train_world_model",
    "write_run_report",
]
