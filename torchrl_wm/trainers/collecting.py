"""Collecting: the real envs of a run, and what acts in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import cloudpickle
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, ParallelEnv, SerialEnv, TransformedEnv

from torchrl_wm._interrupts import blocked_interrupts
from torchrl_wm.modules.keys import strip_next
from torchrl_wm.trainers.episodes import Episodes
from torchrl_wm.trainers.evaluation import MAX_STEPS
from torchrl_wm.trainers.real_envs import (
    copied_source,
    EnvSource,
    episode_seeds,
    make_real_env,
)
from torchrl_wm.trainers.settings import RunConfig
from torchrl_wm.trainers.steps import Steps


class Acting(TensorDictModuleBase):
    """The policy of the real envs: random actions in some episodes, the run's policy in others.

    Args:
        policy: the policy.
        env: one of the envs, whose actions are drawn.
        episodes: say which of them are random.
        hold: for how many steps a random action is kept.
    """

    def __init__(
        self,
        policy: TensorDictModuleBase,
        env: EnvBase,
        episodes: Episodes,
        hold: int = 1,
    ) -> None:
        super().__init__()
        self.in_keys, self.out_keys = list(policy.in_keys), list(policy.out_keys)
        self.policy, self.episodes, self.hold = policy, episodes, hold
        self._action_key = env.action_key
        self._spec = env.full_action_spec_unbatched[env.action_key]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write an action for each env.

        Raises:
            RuntimeError: if an episode does not end.
        """
        episodes = self.episodes
        if episodes.lengths.max() >= MAX_STEPS:
            raise RuntimeError(
                f"The episode has not ended after {MAX_STEPS} steps, and recipes learn from "
                f"episodes that end. Give a time limit: max_episode_steps=..., on the command "
                f"line --max-episode-steps."
            )
        is_random = episodes.random
        if not is_random.all():
            tensordict = self.policy(tensordict)
        elif hasattr(self.policy, "filter"):
            # Latents that go on from step to step need every step.
            tensordict = self.policy.filter(tensordict)
        if is_random.any():
            drawn = self._draw().reshape(*tensordict.batch_size, *self._spec.shape)
            if not is_random.all():
                planned = tensordict.get(self._action_key)
                rows = is_random.view(-1, *[1] * (planned.ndim - 1)).to(planned.device)
                drawn = torch.where(rows, drawn.to(planned.device), planned)
            tensordict.set(self._action_key, drawn.clone())
        return tensordict

    def _draw(self) -> torch.Tensor:
        """Return the random actions, ``[N, *A]``: new ones where the held ones have been kept long enough."""
        episodes = self.episodes
        renewed = episodes.lengths % self.hold == 0
        if renewed.any() or episodes.held is None:
            new = self._spec.rand([len(episodes)])
            if episodes.held is None:
                episodes.held = new
            rows = renewed.view(-1, *[1] * (new.ndim - 1))
            episodes.held = torch.where(rows, new, episodes.held)
        return episodes.held


class RealSteps:
    """The collector of a run: TorchRL's, over the real envs, made when the run begins.

    Args:
        config: says how many envs there are, and where they run.
        source: makes the envs.
        env: one of them, which is used itself if it is the only one in this process.
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
        self.config = config
        is_alone = config.num_envs == 1 and config.collector == "single"
        if not is_alone or config.evaluation_interval or config.film_interval:
            copied_source(source)  # refused now, not when the run has begun
        if config.collector == "processes":
            _pickled(source)
        check_device(policy, device)
        #: The episodes that go on in the envs.
        self.episodes = Episodes(env, config.num_envs, carried_keys(policy))
        self.acting = Acting(policy, env, self.episodes, config.random_hold)
        self._source, self._env, self._device = source, env, device
        self._collector: Collector | None = None
        #: Called when the envs are where the run goes on, before the first action.
        self.on_begin: Callable[[], None] = lambda: None

    @property
    def parts(self) -> dict[str, Any]:
        """The parts that a checkpoint holds."""
        return {"episodes": self.episodes}

    def begin(self) -> None:
        """Begin the first episodes of a run, which are random."""
        everywhere = torch.ones(len(self.episodes), dtype=torch.bool)
        self.episodes.begin(everywhere, random=True)

    def count(self, steps: TensorDictBase, total: int) -> Steps:
        """Count the newest steps; ``total`` is the number of all steps, these included."""
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
            episodes.finished += steps.ended
            is_random = steps.total < self.config.random_steps
            episodes.begin(steps.ended, is_random)
        return rows

    def __iter__(self) -> Iterator[TensorDictBase]:
        """Give the steps of all envs, ``[N]``, on the CPU, without end."""
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
            env = prepared(self._envs(), self.acting.policy)
            if continued is not None:
                env = TransformedEnv(env, continued, auto_unwrap=False)
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
        """Close the envs."""
        if self._collector is not None:
            self._collector.shutdown()
            self._collector = None

    def make_env(self, **kwargs: Any) -> EnvBase:
        """Return another real env of the run, with the entries that the policy needs.

        Args:
            kwargs: arguments for Gymnasium, such as ``render_mode``.
        """
        env = copied_source(self._source)
        made = make_real_env(env, **self.config.env_settings, **kwargs)
        return prepared(made, self.acting.policy)

    def _envs(self) -> EnvBase:
        config, number = self.config, len(self.episodes)
        # Each of N envs has every N-th episode, whenever the others end theirs.
        firsts = (torch.arange(number) + number * self.episodes.finished).tolist()
        if number == 1 and config.collector == "single":
            episode_seeds(self._env).episode = firsts[0]
            return self._env
        common = {**config.env_settings, "stride": number}
        settings = [{"first_episode": first, **common} for first in firsts]
        for each in settings:
            each["env"] = copied_source(self._source)
        if config.collector == "single":
            return SerialEnv(number, make_real_env, create_env_kwargs=settings)
        for each in settings:
            each["env"] = _pickled(each["env"])
        return ParallelEnv(number, _make_pickled, create_env_kwargs=settings)


def prepared(env: EnvBase, policy: Any) -> EnvBase:
    """Return a real env with the entries that a policy carries from step to step."""
    if getattr(policy, "make_tensordict_primer", None) is None:
        return env
    # Zero at a reset of the whole env; the env may also have done flags of its parts.
    primer = policy.make_tensordict_primer(reset_key=env.reset_keys[0])
    return TransformedEnv(env, primer.to("cpu"), auto_unwrap=False)


def check_device(policy: TensorDictModuleBase, device: torch.device) -> None:
    """Refuse a policy on another device: the collector would act with a copy of it.

    Raises:
        ValueError: if a tensor of it is on another device.
    """
    for name, tensor in (*policy.named_parameters(), *policy.named_buffers()):
        if tensor.device.type != device.type:
            raise ValueError(
                f"The policy has {name!r} on {tensor.device}, and the run is on {device}. Move it "
                f"when the recipe makes it: self.policy = policy.to(self.device)."
            )


def carried_keys(policy: Any) -> list:
    """Return the entries that a policy carries from step to step: those that it reads and writes."""
    read = set(policy.in_keys)
    return [key for key in policy.out_keys if strip_next(key) in read]


def _pickled(source: EnvSource) -> bytes:
    """Return what makes an env in a form for other processes; lambdas are supported.

    Raises:
        ValueError: if it cannot be sent to another process.
    """
    try:
        return cloudpickle.dumps(source)
    except Exception as err:  # whatever the env holds
        raise ValueError(
            f"collector='processes' sends what makes the env to other processes, and this "
            f"{type(source).__name__} cannot be ({type(err).__name__}: {err}). Give its name or a "
            f"function that makes it as env=..., or collector='single'."
        ) from err


def _make_pickled(env: bytes, **kwargs: Any) -> EnvBase:
    """Make a real env in its own process."""
    return make_real_env(cloudpickle.loads(env), **kwargs)
