"""Runs: recipes from a real env to a trained policy, and hooks for TorchRL's Trainer."""

from __future__ import annotations

from torchrl_wm._registry import register_recipe
from torchrl_wm.trainers.counted_steps import CollectingError
from torchrl_wm.trainers.episode_seeds import EpisodeSeeds
from torchrl_wm.trainers.evaluation import episode_return, run_episodes
from torchrl_wm.trainers.films import film_policy
from torchrl_wm.trainers.imagined_replay import ImaginedReplayHook
from torchrl_wm.trainers.learning import ModelLearner, NonFiniteLossError
from torchrl_wm.trainers.logged_data import load_transitions
from torchrl_wm.trainers.model_training import train_world_model
from torchrl_wm.trainers.policies import load_policy, Policy
from torchrl_wm.trainers.real_envs import make_real_env
from torchrl_wm.trainers.recipe import Recipe
from torchrl_wm.trainers.recipes import (
    Dreamer,
    DreamerConfig,
    MBPO,
    MBPOConfig,
    ModelConfig,
    ModelRecipe,
    MOPO,
    MOPOConfig,
    PETS,
    PETSConfig,
    PlaNet,
    PlaNetConfig,
    TDMPC2,
    TDMPC2Config,
)
from torchrl_wm.trainers.recorded_env import RecordedEnv
from torchrl_wm.trainers.run_folder import RunFolder
from torchrl_wm.trainers.run_report import (
    plot_learning_curve,
    save_prediction_fan,
    write_run_report,
)
from torchrl_wm.trainers.runs import resume_run, start_run, trainer_class
from torchrl_wm.trainers.sequences import sample_sequences
from torchrl_wm.trainers.settings import RunConfig
from torchrl_wm.trainers.steps import Steps
from torchrl_wm.trainers.trainer import RecipeTrainer
from torchrl_wm.trainers.watching import watch

PETSTrainer = trainer_class(PETS)
MBPOTrainer = trainer_class(MBPO)
MOPOTrainer = trainer_class(MOPO)
TDMPC2Trainer = trainer_class(TDMPC2)
DreamerTrainer = trainer_class(Dreamer)
PlaNetTrainer = trainer_class(PlaNet)

__all__ = [
    "CollectingError",
    "Dreamer",
    "DreamerConfig",
    "DreamerTrainer",
    "EpisodeSeeds",
    "ImaginedReplayHook",
    "MBPO",
    "MBPOConfig",
    "MBPOTrainer",
    "MOPO",
    "MOPOConfig",
    "MOPOTrainer",
    "ModelConfig",
    "ModelLearner",
    "ModelRecipe",
    "NonFiniteLossError",
    "PETS",
    "PETSConfig",
    "PETSTrainer",
    "PlaNet",
    "PlaNetConfig",
    "PlaNetTrainer",
    "Policy",
    "Recipe",
    "RecipeTrainer",
    "RecordedEnv",
    "RunConfig",
    "RunFolder",
    "Steps",
    "TDMPC2",
    "TDMPC2Config",
    "TDMPC2Trainer",
    "episode_return",
    "film_policy",
    "load_policy",
    "load_transitions",
    "make_real_env",
    "plot_learning_curve",
    "register_recipe",
    "resume_run",
    "run_episodes",
    "sample_sequences",
    "save_prediction_fan",
    "start_run",
    "train_world_model",
    "trainer_class",
    "watch",
    "write_run_report",
]
