"""Collecting on the workers of Ray, on this machine or many."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors.distributed import RayCollector
from torchrl.envs import EnvBase

from torchrl_wm._interrupts import check_interrupt
from torchrl_wm.trainers.counted_steps import (
    CollectingError,
    CountedSteps,
    make_pickled,
    pickled_source,
)
from torchrl_wm.trainers.policy_copies import copied_policy
from torchrl_wm.trainers.ray_connection import RayConnection
from torchrl_wm.trainers.ray_workers import Begin, EnvWorker, named_tensors
from torchrl_wm.trainers.real_envs import copied_source, EnvSource
from torchrl_wm.trainers.settings import RunConfig

#: For how long workers may take to start: other jobs may have their CPUs.
START_SECONDS = 300.0
#: How many workers of one env in a row may be lost before one gives a batch.
MAX_LOST = 3


class RaySteps(CountedSteps):
    """The collector of a run on the workers of Ray: each has one real env and a copy of the policy.

    Each worker makes ``ray_batch`` steps at a request. The batches of all workers are handed on
    step by step, so that the envs take turns as elsewhere. A request is made before the batch of the
    one before is there: while the recipe learns from a batch, the workers make the next one, with
    weights that know nothing of the batch before.

    A worker that is lost is replaced, and its env begins a new episode. What is in the replay
    stays, and so do the other envs.

    Args:
        config: says how many envs there are, and what their workers ask for.
        source: makes the envs.
        env: one of them.
        policy: the policy.
        device: the device of the policy. The copies act on CPUs.
    """

    def __init__(
        self,
        config: RunConfig,
        source: EnvSource,
        env: EnvBase,
        policy: TensorDictModuleBase,
        device: torch.device,
    ) -> None:
        # Refused now, not when the run has begun.
        self._sent = pickled_source(copied_source(source), config.collector)
        super().__init__(config, source, env, policy, device)
        cpus = config.num_envs * config.ray_cpus
        self._connection = RayConnection(config.ray_address, cpus)
        self._collector: RayCollector | None = None
        self._pushed = 0

    def prepare(self) -> None:
        """Refuse what cannot run here; Ray is not started before the run begins.

        Raises:
            ImportError: if Ray is not installed.
            ConnectionError: if nobody answers, or with another version.
            ValueError: if there are too few CPUs, or the policy cannot be sent.
        """
        copied_policy(self.policy, "cpu")
        self._connection.check()

    def __iter__(self) -> Iterator[TensorDictBase]:
        self._connection.open()
        if self._total:  # envs elsewhere do not repeat their episodes
            self._begin_next(torch.ones(len(self.episodes), dtype=torch.bool))
        self._collector = self._make_collector()
        self._wait_for(self._collector.remote_collectors)
        self._pushed = self._total
        self.on_begin()
        asked = self._ask_all()
        while True:
            following = self._ask_all()  # so that no worker ever waits for this process
            batches = self._received(asked, following)
            asked = following
            yield from torch.stack(batches).unbind(1)

    def shutdown(self) -> None:
        if self._collector is not None:
            self._collector.shutdown()
            self._collector = None
        self._connection.close()

    # Workers ------------------------------------------------------------------

    def _make_collector(self) -> RayCollector:
        """Return TorchRL's collector, which makes the workers."""
        config = self.config
        return RayCollector(
            self._env_makers(),
            copied_policy(self.policy, "cpu"),
            collector_class=EnvWorker,
            collector_kwargs=[
                {"begin": self._begin(k)} for k in range(config.num_envs)
            ],
            sync=True,
            frames_per_batch=config.num_envs * config.ray_batch,
            remote_configs={"num_cpus": config.ray_cpus, "num_gpus": 0},
            # Weights go through Ray's store, once for each machine: TorchRL's own schemes make
            # a process group, in which no worker can be replaced.
            weight_sync_schemes={},
        )

    def _env_makers(self) -> list:
        return [
            partial(make_pickled, self._sent, **settings)
            for settings in self._settings_of_envs()
        ]

    def _begin(self, env: int) -> Begin:
        config = self.config
        return Begin(
            config.seed,
            env,
            config.num_envs,
            self._total,
            config.random_steps,
            config.random_hold,
        )

    def _wait_for(self, workers: list) -> None:
        """Wait until workers have started.

        Raises:
            CollectingError: if they do not.
        """
        import ray

        until = time.monotonic() + START_SECONDS
        waiting = [worker.__ray_ready__.remote() for worker in workers]
        while waiting:
            check_interrupt()
            ready, waiting = ray.wait(waiting, timeout=1.0)
            try:
                ray.get(ready)
            except ray.exceptions.RayError as err:
                raise CollectingError(f"A worker of Ray cannot start: {err}") from err
            if waiting and time.monotonic() > until:
                free = ray.available_resources().get("CPU", 0.0)
                raise CollectingError(
                    f"{len(waiting)} workers of Ray did not start within {START_SECONDS:g} s. "
                    f"Each asks for ray_cpus={self.config.ray_cpus:g} CPUs, and {free:g} of the "
                    f"cluster's are free."
                )

    def _replace(self, envs: list[int]) -> None:
        """Replace the lost workers of some envs, which begin new episodes."""
        import ray

        number = len(self.episodes)
        self._begin_next(torch.isin(torch.arange(number), torch.tensor(envs)))
        collector, makers = self._collector, self._env_makers()
        workers = collector.remote_collectors
        for env in envs:
            ray.kill(workers[env])  # it is there if only its batch was lost
        collector.add_collectors(
            [makers[env] for env in envs],
            1,
            copied_policy(self.policy, "cpu"),
            [
                {**collector.collector_kwargs[env], "begin": self._begin(env)}
                for env in envs
            ],
            [{"num_cpus": self.config.ray_cpus, "num_gpus": 0}] * len(envs),
        )
        new = workers[number:]
        del workers[number:]
        for env, worker in zip(envs, new):
            workers[env] = worker
        self._wait_for(new)

    # Batches and weights ------------------------------------------------------

    def _ask_all(self) -> list[list]:
        """Ask each worker for its next batch, with new weights if they are due."""
        import ray

        stored = None
        if self._total - self._pushed >= self.config.ray_push_interval:
            self._pushed = self._total
            weights = {
                name: tensor.detach().cpu()
                for name, tensor in named_tensors(self.policy).items()
            }
            stored = ray.put(weights)
        return [self._ask(env, stored) for env in range(len(self.episodes))]

    def _ask(self, env: int, weights: Any = None) -> list:
        """Ask a worker for its next batch, with new weights if there are some.

        A worker does things in the order of the requests, so that the last of them is the batch.
        """
        worker = self._collector.remote_collectors[env]
        loaded = [] if weights is None else [worker.load_weights.remote(weights)]
        return [*loaded, worker.next.remote()]

    def _received(
        self, asked: list[list], following: list[list]
    ) -> list[TensorDictBase]:
        """Return the batch of each worker, ``[T]``; lost workers are replaced.

        Args:
            asked: the requests for these batches.
            following: those for the next ones, which are repeated to new workers.

        Raises:
            CollectingError: if the worker of an env is lost again and again.
        """
        import ray

        batches: dict[int, TensorDictBase] = {}
        lost = [0] * len(asked)
        waiting = dict(enumerate(asked))
        while waiting:
            check_interrupt()
            last = [requests[-1] for requests in waiting.values()]
            ready, _ = ray.wait(last, num_returns=len(last), timeout=1.0)
            gone = []
            for env in [env for env in waiting if waiting[env][-1] in ready]:
                try:
                    # The weights too: a worker that cannot take them would act with old ones.
                    *_, batches[env] = ray.get(waiting.pop(env))
                except ray.exceptions.RayError as err:
                    if not _is_loss(err):
                        raise
                    lost[env] += 1
                    if lost[env] > MAX_LOST:
                        raise CollectingError(
                            f"{lost[env]} workers of Ray were lost, one after the other, all with "
                            f"env {env}: {err}"
                        ) from err
                    gone.append(env)
            if gone:  # together, as when a machine is gone
                self._replace(gone)
            for env in gone:
                waiting[env], following[env] = self._ask(env), self._ask(env)
        return [batches[env] for env in range(len(asked))]


def _is_loss(err: Exception) -> bool:
    """Return whether an error means that a worker, or the batch that it made, is gone."""
    from ray import exceptions

    # What the env raises is an instance of its own class, too.
    return not isinstance(err, exceptions.RayTaskError) and isinstance(
        err,
        (
            exceptions.NodeDiedError,
            exceptions.ObjectLostError,
            exceptions.OutOfMemoryError,
            exceptions.RayActorError,
            exceptions.WorkerCrashedError,
        ),
    )
