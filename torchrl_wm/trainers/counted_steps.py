"""The base of collectors: what is counted of the steps of real envs, wherever the envs run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase

from torchrl_wm.trainers.acting import carried_keys, check_device, prepared
from torchrl_wm.trainers.episodes import Episodes
from torchrl_wm.trainers.real_envs import copied_source, EnvSource, make_real_env
from torchrl_wm.trainers.settings import RunConfig
from torchrl_wm.trainers.steps import Steps


class CollectingError(RuntimeError):
    """An error of the real envs, which cannot go on; what was learnt is sound.

    If the run has a folder and made steps, it is saved as it is, and the error says where.
    """


class CountedSteps:
    """The base of the collectors of runs, which counts steps and episodes.

    A subclass says in :meth:`__iter__` where the envs run.

    Args:
        config: says how many envs there are, and where they run.
        source: makes the envs.
        env: one of them.
        policy: the policy.
        device: the device of the policy.
    """

    #: Read by TorchRL's Trainer, which would count random steps itself.
    init_random_frames = 0

    def __init__(
        self,
        config: RunConfig,
        source: EnvSource,
        env: EnvBase,
        policy: TensorDictModuleBase,
        device: torch.device,
    ) -> None:
        check_device(policy, device)
        self.config, self.policy = config, policy
        #: The episodes that go on in the envs.
        self.episodes = Episodes(env, config.num_envs, carried_keys(policy))
        self._source, self._env, self._device = source, env, device
        self._total = 0
        #: Called when the envs are where the run goes on, before the first action.
        self.on_begin: Callable[[], None] = lambda: None

    @property
    def parts(self) -> dict[str, Any]:
        """The parts that a checkpoint holds."""
        return {"episodes": self.episodes}

    def prepare(self) -> None:
        """Refuse what cannot run here, before the run has a folder."""

    def begin(self, total: int = 0) -> None:
        """Begin the first episodes of a run, which are random, or go on with those there are.

        Args:
            total: how many steps the run has made.
        """
        self._total = total
        if not total:
            everywhere = torch.ones(len(self.episodes), dtype=torch.bool)
            self.episodes.begin(everywhere, random=True)

    def __iter__(self) -> Iterator[TensorDictBase]:
        """Give the steps of all envs, ``[N]``, on the CPU, without end."""
        raise NotImplementedError

    def count(self, steps: TensorDictBase, total: int) -> Steps:
        """Count the newest steps; ``total`` is the number of all steps, these included."""
        self._total = total
        ended = self.episodes.add(steps)
        lengths, random = self.episodes.lengths.clone(), self.episodes.random.clone()
        return Steps(steps, total, ended, lengths, random)

    def finished(self, steps: Steps, before: int) -> list[dict[str, Any]]:
        """End the episodes that ended; return a row of the metrics for each.

        Args:
            steps: the newest steps.
            before: how many episodes had ended before.
        """
        episodes, rows = self.episodes, []
        for env in steps.ended.nonzero().flatten().tolist():
            rows.append(
                {
                    "episode": before + len(rows) + 1,
                    "return": episodes.returns[env].item(),
                    "length": int(episodes.lengths[env]),
                    "random": int(episodes.random[env]),
                }
            )
        if rows:
            self._begin_next(steps.ended)
        return rows

    def shutdown(self) -> None:
        """Close the envs."""

    def make_env(self, **kwargs: Any) -> EnvBase:
        """Return another real env of the run, with the entries that the policy needs.

        Args:
            kwargs: arguments for Gymnasium, such as ``render_mode``.
        """
        env = copied_source(self._source)
        made = make_real_env(env, **self.config.env_settings, **kwargs)
        return prepared(made, self.policy)

    def _begin_next(self, rows: torch.Tensor) -> None:
        """Begin the next episodes in some envs, ``[N]`` bool."""
        self.episodes.finished += rows
        self.episodes.begin(rows, self._total < self.config.random_steps)

    def _settings_of_envs(self) -> list[dict[str, Any]]:
        """Return the arguments of each env: the settings, and its episodes.

        Each of N envs has every N-th episode, whenever the others end theirs.
        """
        number = len(self.episodes)
        firsts = (torch.arange(number) + number * self.episodes.finished).tolist()
        common = {**self.config.env_settings, "stride": number}
        return [{"first_episode": first, **common} for first in firsts]


def pickled_source(source: EnvSource, collector: str) -> bytes:
    """Return what makes an env in a form for other processes; lambdas are supported.

    Args:
        source: makes the env.
        collector: the setting that needs it.

    Raises:
        ValueError: if it cannot be sent to another process.
    """
    try:
        return cloudpickle.dumps(source)
    except Exception as err:  # whatever the env holds
        raise ValueError(
            f"collector={collector!r} sends what makes the env to other processes, and this "
            f"{type(source).__name__} cannot be ({type(err).__name__}: {err}). Give its name or a "
            f"function that makes it as env=..., or collector='single'."
        ) from err


def make_pickled(env: bytes, **kwargs: Any) -> EnvBase:
    """Make a real env in its own process."""
    return make_real_env(cloudpickle.loads(env), **kwargs)
