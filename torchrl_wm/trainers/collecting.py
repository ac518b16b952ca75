"""Collecting on this machine: the real envs in this process, or each in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, ParallelEnv, SerialEnv, TransformedEnv
from torchrl_wm._interrupts import blocked_interrupts

from torchrl_wm.modules import memory_apart
from torchrl_wm.trainers.acting import Acting, prepared
from torchrl_wm.trainers.counted_steps import CountedSteps, make_pickled, pickled_source
from torchrl_wm.trainers.real_envs import (
    copied_source,
    EnvSource,
    episode_seeds,
    make_real_env,
)
from torchrl_wm.trainers.settings import RunConfig


class RealSteps(CountedSteps):
    """The collector of a run on this machine: TorchRL's, over the real envs, made when the run begins.

    Args:
        config: says how many envs there are, and where they run.
        source: makes the envs.
        env: one of them, which is used itself if it is the only one in this process.
        policy: the policy.
        device: the device of the policy.
    """

    def __init__(
        self,
        config: RunConfig,
        source: EnvSource,
        env: EnvBase,
        policy: TensorDictModuleBase,
        device: torch.device,
    ) -> None:
        is_alone = config.num_envs == 1 and config.collector == "single"
        if not is_alone or config.evaluation_interval or config.film_interval:
            copied_source(source)  # refused now, not when the run has begun
        if config.collector == "processes":
            pickled_source(source, config.collector)
        super().__init__(config, source, env, policy, device)
        self.acting = Acting(policy, env, self.episodes, config.random_hold)
        self._collector: Collector | None = None

    def __iter__(self) -> Iterator[TensorDictBase]:
        continued = self.episodes.continued()
        devices = {}
        if self._device.type != "cpu":
            devices = {
                "policy_device": self._device,
                "env_device": "cpu",
                "storing_device": "cpu",
            }
        processes = self.config.collector == "processes"  # which are started here
        with blocked_interrupts() if processes else nullcontext():
            env = prepared(self._envs(), self.policy)
            if continued is not None:
                env = TransformedEnv(env, continued, auto_unwrap=False)
            with memory_apart(self.acting):  # the policy is tried out here
                self._collector = Collector(
                    env,
                    self.acting,
                    frames_per_batch=len(self.episodes),
                    total_frames=-1,
                    auto_register_policy_transforms=False,
                    **devices,
                )
        if continued is not None and continued.is_abandoned:
            self.episodes.abandon()
        self.on_begin()
        for batch in self._collector:
            yield batch.reshape(-1)

    def shutdown(self) -> None:
        if self._collector is not None:
            self._collector.shutdown()
            self._collector = None

    def _envs(self) -> EnvBase:
        collector, settings = self.config.collector, self._settings_of_envs()
        if len(settings) == 1 and collector == "single":
            episode_seeds(self._env).episode = settings[0]["first_episode"]
            return self._env
        for each in settings:
            each["env"] = copied_source(self._source)
        if collector == "single":
            return SerialEnv(len(settings), make_real_env, create_env_kwargs=settings)
        for each in settings:
            each["env"] = pickled_source(each["env"], collector)
        return ParallelEnv(len(settings), make_pickled, create_env_kwargs=settings)
