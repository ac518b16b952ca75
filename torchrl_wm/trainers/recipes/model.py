"""The recipe that learns only a world model, from logged data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import EnvBase

from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.models import save_world_model
from torchrl_wm.trainers.log_settings import LogSettings
from torchrl_wm.trainers.model_training import (
    as_episodes,
    held_out_errors,
    ModelTraining,
)
from torchrl_wm.trainers.real_envs import copied_source, EnvSource, make_real_env
from torchrl_wm.trainers.recipe import Counts, Recipe
from torchrl_wm.trainers.settings import Above, AtLeast, Within
from torchrl_wm.trainers.steps import Steps


@dataclass(frozen=True, kw_only=True)
class ModelConfig(LogSettings):
    """The settings of :class:`ModelRecipe`. Its steps are gradient steps.

    Args:
        observation_keys: which observations to model, all of them if none is named; nested
            names are joined by slashes.
        steps: how many gradient steps to train for.
        checkpoint_interval: how many measurements of the held-out error pass between two
            checkpoints.
        held_out: the share of the episodes that is not trained on.
        interval: how many gradient steps pass between two measurements of the held-out error.
        members: how many networks the ensemble has.
        elites: how many of the members predict; None for 5, or all of fewer.
        hidden: the sizes of the hidden layers of each member.
        learning_rate: the learning rate of the optimizer, AdamW.
        weight_decay: the weight decay of the optimizer, AdamW.
        batch_size: how many transitions a batch has.
    """

    observation_keys: tuple[str, ...] = ()
    steps: Annotated[int, AtLeast(1)] = 2000
    held_out: Annotated[float, Within(0, 1)] = 0.1
    interval: Annotated[int, AtLeast(1)] = 200
    members: Annotated[int, AtLeast(1)] = 7
    elites: int | None = None
    hidden: tuple[int, ...] = (200, 200, 200, 200)
    learning_rate: Annotated[float, Above(0)] = 1e-3
    weight_decay: Annotated[float, AtLeast(0)] = 1e-5
    batch_size: Annotated[int, AtLeast(1)] = 256


class ModelRecipe(Recipe):
    """Learn only a world model, from logged data.

    Args:
        config: the settings.
        env: the env that was recorded; None to read its specs off the data.

    Attributes:
        training: trains the ensemble, and has the held-out data.
        real_env: the env that was recorded, if it was given.
    """

    name = "model"
    learns_from_log = True
    config_class = ModelConfig
    config: ModelConfig

    def __init__(self, config: ModelConfig, env: EnvBase | None) -> None:
        self.real_env = env
        rows, env = config.read(env)
        super().__init__(config, env)
        keys = [tuple(name.split("/")) for name in config.observation_keys]
        self.training = ModelTraining(
            rows,
            env,
            held_out=config.held_out,
            seed=config.seed,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            batch_size=config.batch_size,
            device=self.device,
            members=config.members,
            elites=config.elites,
            hidden=config.hidden,
            observation_keys=keys or None,
        )
        self.world_model = self.training.world_model
        self.parts = {"training": self.training}

    @classmethod
    def make_env(cls, config: ModelConfig, source: EnvSource | None) -> EnvBase | None:
        """Return the env that was recorded, if the config names it."""
        return config.make_env(source)

    def make_collector(self, source: EnvSource | None) -> GradientSteps:
        """Return the collector that counts gradient steps."""
        source = self.config.env if source is None else source
        return GradientSteps(self.config.interval, self.config.steps, source)

    def learn(self, steps: Steps) -> dict[str, float]:
        """Make as many gradient steps, and measure the held-out error."""
        return self.training.advance(steps.count, self.on_fit)

    def measures(self) -> dict[str, float]:
        """Return the errors of the best model on the held-out data."""
        return held_out_errors(self.training.best_model(), self.training.test)

    @property
    def title(self) -> str:
        rows = len(self.training.train) + len(self.training.test)
        return f"A world model of {rows} transitions from {self.config.data}"

    @property
    def has_real_env(self) -> bool:
        return self.real_env is not None

    @property
    def has_learnt(self) -> bool:
        return self.training.learner.steps > 0

    def diagnosed_env(self) -> WorldModelEnv:
        """Return the imagined env of the best model."""
        return WorldModelEnv(self.training.best_model(), self.env, batch_size=[])

    def held_out_episodes(self) -> list[TensorDictBase]:
        """Return the episodes that are not trained on."""
        return as_episodes(self.training.test)

    def finish(self, folder: Path) -> None:
        """Save the best model."""
        save_world_model(self.training.best_model(), folder / "model.pt")


class GradientSteps:
    """A collector that counts gradient steps, for a run without a real env.

    Args:
        interval: how many steps make a row of the metrics.
        total: how many steps there are in all.
        source: makes the real env that evaluations are in; None if there is none.
    """

    #: Read by TorchRL's Trainer.
    init_random_frames = 0

    def __init__(
        self, interval: int, total: int, source: EnvSource | None = None
    ) -> None:
        self.interval, self.total, self._source = interval, total, source
        self._counts = Counts(done=0)
        self.on_begin: Callable[[], None] = lambda: None

    @property
    def parts(self) -> dict[str, Any]:
        """The parts that a checkpoint holds."""
        return {"gradient_steps": self._counts}

    def prepare(self) -> None:
        """Do nothing: gradient steps need no real envs."""

    def begin(self, total: int) -> None:
        """Do nothing: there are no episodes to begin."""

    def __iter__(self) -> Iterator[TensorDictBase]:
        """Give empty steps, ``[interval]``."""
        self.on_begin()
        while (done := self._counts.done) < self.total:
            # To the next multiple of the interval, so that longer runs measure at the same steps.
            number = min(self.interval - done % self.interval, self.total - done)
            yield TensorDict({}, batch_size=[number])

    def count(self, steps: TensorDictBase, total: int) -> Steps:
        """Count the steps."""
        self._counts.done = total
        none = torch.zeros(len(steps), dtype=torch.bool)
        return Steps(steps, total, none, none.long(), none)

    def finished(self, steps: Steps, before: int) -> list[dict[str, Any]]:
        """Return a row of the metrics, for the losses and errors."""
        return [{}]

    def shutdown(self) -> None:
        """Do nothing: nothing is open."""

    def make_env(self, **kwargs: Any) -> EnvBase:
        """Return the env that was recorded.

        Args:
            kwargs: arguments for Gymnasium, such as ``render_mode``.

        Raises:
            ValueError: if the run does not know it.
        """
        if self._source is None:
            raise ValueError(
                "The run has learnt from a log, and knows no real env to act in. Start it with "
                "env=..., on the command line --env; or load its policy, "
                "torchrl_wm.trainers.load_policy(run), and act yourself."
            )
        return make_real_env(copied_source(self._source), **kwargs)
