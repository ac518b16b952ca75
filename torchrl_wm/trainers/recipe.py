"""The base of recipes: only what differs between algorithms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.data import ReplayBuffer, TensorDictReplayBuffer
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType

from torchrl_wm.diagnostics import ReportSection
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules import WorldModel
from torchrl_wm.trainers.collectors import real_steps
from torchrl_wm.trainers.filtered_policy import FilteredPolicy
from torchrl_wm.trainers.frame_storage import FrameStorage
from torchrl_wm.trainers.real_envs import EnvSource, make_real_env
from torchrl_wm.trainers.settings import resolve_device, RunConfig, Settings
from torchrl_wm.trainers.steps import Steps


class Recipe:
    """An algorithm: its parts, what it keeps of a real step, and how it learns.

    A subclass builds its modules in ``__init__`` and sets the attributes below; its
    :meth:`learn` is the algorithm box of its paper. The trainer does the rest of a run:
    collecting, evaluation, metrics, checkpoints.

    Args:
        config: the settings.
        env: a real env of batch size ``[]``, whose specs say what to build.

    Attributes:
        parts: the parts of a checkpoint, by name: modules, optimisers, replay buffers, anything
            with ``state_dict`` and ``load_state_dict``.
        replay: the buffer of real steps, filled before each :meth:`learn`. It is one of the parts.
        policy: the policy, on the run's device.
        world_model: the model that the report is on; None if there is no report.
        on_fit: called with ``(step, steps)`` at each gradient step of a long training, so that
            the run shows its progress and reacts to Ctrl-C.

    Examples:
        The guide's page "Write a recipe" has a complete recipe.
    """

    #: The name on the command line and in files; :func:`register_recipe` sets it.
    name: ClassVar[str] = ""
    config_class: ClassVar[type[Settings]] = RunConfig
    #: The keywords of objects that it takes from Python beside its settings, such as functions.
    objects: ClassVar[tuple[str, ...]] = ()
    #: Whether the policy can also act in the imagined env. A planner acts in the real one.
    acts_in_model: ClassVar[bool] = True
    #: Whether it learns from a log, on whose held-out episodes the report is.
    learns_from_log: ClassVar[bool] = False
    #: The exploration type of evaluations.
    evaluation_exploration: ClassVar[ExplorationType] = ExplorationType.DETERMINISTIC

    parts: dict[str, Any]
    replay: ReplayBuffer | None = None
    policy: TensorDictModuleBase | None = None
    world_model: WorldModel | None = None

    def __init__(self, config: Settings, env: EnvBase) -> None:
        self.config, self.env = config, env
        self.device = resolve_device(config.device)
        self.on_fit: Callable[[int, int], Any] = lambda step, steps: None

    @classmethod
    def make_env(cls, config: Settings, source: EnvSource | None) -> EnvBase | None:
        """Return the real env whose specs the recipe reads.

        Args:
            config: the settings.
            source: the env or what makes it, if ``config.env`` is not enough.
        """
        source = config.env if source is None else source
        return make_real_env(source, **config.env_settings)

    def make_collector(self, source: EnvSource | None) -> Any:
        """Return the collector of a run, which makes the steps of the real envs."""
        if self.policy is None:
            raise TypeError(
                f"The recipe {type(self).__name__} sets no policy. Set self.policy, what acts in "
                f"the real envs, in its __init__."
            )
        source = self.config.env if source is None else source
        return real_steps(self.config, source, self.env, self.policy, self.device)

    def kept(self, steps: TensorDictBase) -> TensorDictBase:
        """Return what is kept of real steps, ``[N]``; the trainer puts it into the replay."""
        return steps

    def learn(self, steps: Steps) -> Mapping[str, torch.Tensor | float]:
        """Learn, after each step of the real envs, once the random steps are over.

        Args:
            steps: the steps that were just made. They are in the replay.

        Returns:
            Losses by name, for the next row of the metrics. Tensors may stay on their device.
        """
        raise NotImplementedError

    def is_over(self, metrics: list[dict[str, Any]]) -> bool:
        """Return whether the run is over for a reason of the recipe's own.

        Args:
            metrics: the rows so far.
        """
        return False

    def expected_steps(self, metrics: list[dict[str, Any]], total: int) -> int | None:
        """Return about how many steps the run will have made in the end, if that is known."""
        return self.config.steps

    @property
    def title(self) -> str:
        """The title of its runs."""
        return f"{self.name} on {self.config.about}"

    @property
    def latents(self) -> list[NestedKey]:
        """The entries of real steps that the model computes; none by default."""
        return []

    @property
    def has_learnt(self) -> bool:
        """Whether the world model has been trained at all."""
        return self.world_model is not None

    def diagnosed_env(self) -> WorldModelEnv:
        """Return the imagined env for reports, films and open-loop errors; it decodes if it can."""
        decode = self.world_model.decoder is not None
        return WorldModelEnv(self.world_model, self.env, batch_size=[], decode=decode)

    @property
    def latent_policy(self) -> TensorDictModuleBase | None:
        """What acts on states of :meth:`diagnosed_env`: the policy, or what is behind its filter."""
        policy = self.policy
        return policy.actor if isinstance(policy, FilteredPolicy) else policy

    def exported_policies(self) -> dict[str, TensorDictModuleBase]:
        """Return the policies that can leave the run, by name; "policy" is what evaluations act by.

        By default the others are :attr:`policies`. A planner among them is refused by name when it
        is asked for.
        """
        own = {} if self.policy is None else {"policy": self.policy}
        return {**own, **self.policies}

    @property
    def has_real_env(self) -> bool:
        """Whether there is a real env to act in; a recipe that learns from a log may have none."""
        return True

    @property
    def policy_has_learnt(self) -> bool:
        """Whether an evaluation makes sense; only a recipe that trains a model first says no."""
        return True

    @property
    def policies(self) -> dict[str, TensorDictModuleBase]:
        """The policies by name that an evaluation compares, if the recipe learns several."""
        return {}

    def measures(self) -> dict[str, float]:
        """Return the numbers that ``torchrl-wm evaluate`` prints without a policy or a real env."""
        return {}

    def report_sections(
        self, returns: Callable[[TensorDictModuleBase], list[float]] | None
    ) -> list[ReportSection]:
        """Return the recipe's own sections of the report, which come first.

        Args:
            returns: gives real returns of a policy; None without a real env.
        """
        return []

    def finish(self, folder: Path) -> None:
        """Write the results of a finished run into its folder, such as a model."""


class Counts:
    """Counters of a recipe, as a part of its checkpoints.

    Args:
        counts: their first values, by name.

    Examples:
        >>> from torchrl_wm.trainers.recipe import Counts
        >>> counts = Counts(updates=0)
        >>> counts.updates += 1
        >>> counts.state_dict()
        {'updates': 1}
    """

    def __init__(self, **counts: float) -> None:
        self.__dict__.update(counts)

    def state_dict(self) -> dict[str, float]:
        """Return the numbers."""
        return dict(self.__dict__)

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.__dict__.update(state_dict)


def make_replay(
    capacity: int,
    device: torch.device | str = "cpu",
    images: Literal["memory", "disk"] = "memory",
) -> ReplayBuffer:
    """Return a replay buffer that keeps and samples transitions on a device, each image once.

    Args:
        capacity: how many transitions it keeps.
        device: the device of transitions, also of those whose images are on the disk.
        images: where images are kept; see
            :class:`~torchrl_wm.trainers.frame_storage.FrameStorage`.
    """
    storage = FrameStorage(capacity, device=device, images=images)
    return TensorDictReplayBuffer(storage=storage)
