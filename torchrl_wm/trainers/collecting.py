"""Collecting: the real envs of a run, what acts in them, and the episodes that go on there."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, ParallelEnv, SerialEnv, Transform, TransformedEnv

from torchrl_wm._interrupts import blocked_interrupts
from torchrl_wm.modules.keys import join, strip_next
from torchrl_wm.trainers.checkpoints import from_plain_entries, plain_entries
from torchrl_wm.trainers.evaluation import MAX_STEPS
from torchrl_wm.trainers.real_envs import (
    another,
    EnvSource,
    episode_seeds,
    make_real_env,
)
from torchrl_wm.trainers.settings import RunConfig
from torchrl_wm.trainers.steps import Steps


class Episodes:
    """The episodes that go on in the real envs of a run, and how they came to where they are.

    Each env begins its episodes from seeds (:class:`EpisodeSeeds`), so that the actions since
    then bring it to where it is: a run goes on from a checkpoint in the midst of episodes.

    Args:
        env: one of the envs.
        num_envs: ``N``.
        carried_keys: the entries that the policy hands from step to step.

    Attributes:
        finished: how many episodes each env has finished, ``[N]``.
        returns, lengths: of the episodes so far, ``[N]``.
        random: which of them are acted at random, ``[N]``.
    """

    def __init__(self, env: EnvBase, num_envs: int, carried_keys: list) -> None:
        self._env, self._carried_keys = env, carried_keys
        self.finished = torch.zeros(num_envs, dtype=torch.long)
        self.returns = torch.zeros(num_envs, dtype=torch.double)
        self.lengths = torch.zeros(num_envs, dtype=torch.long)
        self.random = torch.zeros(num_envs, dtype=torch.bool)
        #: The random actions that are held, ``[N, *A]``.
        self.held: torch.Tensor | None = None
        #: What was done at the steps since the oldest of the episodes began, ``[N]`` each.
        self._actions: list[TensorDictBase] = []
        self._last: TensorDictBase | None = None

    def __len__(self) -> int:
        return len(self.finished)

    def begin(self, rows: torch.Tensor, random: bool) -> None:
        """Begin new episodes in some envs, ``[N]`` bool."""
        self.returns[rows], self.lengths[rows], self.random[rows] = 0.0, 0, random
        self._forget()

    def abandon(self) -> None:
        """Begin new episodes in all envs, random ones where random ones went on."""
        self.finished += 1
        self.returns.zero_(), self.lengths.zero_()
        self._forget()

    def add(self, steps: TensorDictBase) -> torch.Tensor:
        """Count a step of each env, ``[N]``; return which of them ended their episodes."""
        rewards = steps.get(join("next", self._env.reward_key))
        self.returns += rewards.reshape(len(self), -1).sum(1).double()
        self.lengths += 1
        self._actions.append(steps.select(*self._env.action_keys))
        self._forget()
        self._last = steps
        ended = steps.get(join("next", self._env.done_keys[0]))
        return ended.reshape(len(self), -1).any(1)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, and what :class:`ContinuedEpisodes` needs, as plain data."""
        state = {
            "finished": self.finished,
            "returns": self.returns,
            "lengths": self.lengths,
            "random": self.random,
            "held": self.held,
        }
        if self._actions:
            actions, last = self._so_far()
            state["actions"], state["last"] = map(plain_entries, (actions, last))
            state["steps"] = len(self._actions)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if len(state_dict["finished"]) != len(self):
            raise ValueError(
                f"it has {len(state_dict['finished'])} envs, and the run {len(self)}"
            )
        for name in ("finished", "returns", "lengths", "random"):
            getattr(self, name).copy_(state_dict[name])
        self.held = state_dict["held"]
        if "last" in state_dict:
            size = [len(self), state_dict["steps"]]
            self._last = from_plain_entries(state_dict["last"], size[:1])
            actions = from_plain_entries(state_dict["actions"], size)
            self._actions = list(actions.unbind(1))

    def _forget(self) -> None:
        """Leave no actions but those of the episodes that go on."""
        longest = int(self.lengths.max())
        self._actions = self._actions[-longest:] if longest else []

    def continued(self) -> ContinuedEpisodes | None:
        """Return what brings new envs to where these are; None where all are at the beginning."""
        if not self.lengths.any():
            return None
        lengths = self.lengths.clone()
        return ContinuedEpisodes(*self._so_far(), lengths, self._carried_keys)

    def _so_far(self) -> tuple[TensorDictBase, TensorDictBase]:
        """The actions since the oldest episode began, ``[N, T]``, and the last step, ``[N]``."""
        observed = [join("next", key) for key in self._env.observation_keys]
        last = self._last.select(*observed, *self._carried_keys, strict=False)
        return torch.stack(self._actions, 1), last


class ContinuedEpisodes(Transform):
    """Brings envs at their first reset to where the episodes of a checkpoint were.

    Args:
        actions: what was done, ``[N, T]``, the newest action last.
        last: the last step, ``[N]``.
        lengths: how many of the actions belong to the episode of each env, ``[N]``.
        carried_keys: what of the last step goes on with the policy.
    """

    def __init__(
        self,
        actions: TensorDictBase,
        last: TensorDictBase,
        lengths: torch.Tensor,
        carried_keys: list,
    ) -> None:
        super().__init__()
        self._actions: TensorDictBase | None = actions
        self._last, self._lengths = last, lengths
        self._carried_keys = carried_keys
        #: Whether the envs did something else than before, and began new episodes.
        self.is_abandoned = False

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        if self._actions is None:
            return tensordict_reset
        done, self._actions = self._actions, None
        env, size = self.parent, self.parent.batch_size
        now = tensordict_reset
        longest = int(self._lengths.max())
        for step in range(longest):
            # Episodes are of different lengths: the shorter ones are acted in later.
            acts = (longest - step) <= self._lengths
            before = now.copy().update(done[:, step - longest].reshape(size))
            if not acts.all():
                before.set("_step", acts)
            # What the root has at a reset, and no more: actions stay behind.
            after = env.step_mdp(env.step(before)).select(*now.keys(True, True))
            now = after if acts.all() else torch.where(acts, after, now)
        last, goes_on = self._last, self._lengths > 0
        observed = last.exclude(*self._carried_keys).get("next")
        if not _is_same(now.reshape(-1)[goes_on], observed[goes_on]):
            warnings.warn(
                "The real env does not repeat itself from its seed and actions: the episodes that "
                "went on at the checkpoint are left, and new ones begin.",
                stacklevel=2,
            )
            self.is_abandoned = True
            return env.reset()
        now = now.copy()
        for key in self._carried_keys:
            fresh = now.get(strip_next(key))
            carried = last.get(key).reshape(fresh.shape)
            rows = goes_on.reshape(size).view(*size, *[1] * (fresh.ndim - len(size)))
            now.set(strip_next(key), torch.where(rows, carried, fresh))
        return now


class Acting(TensorDictModuleBase):
    """What acts in the real envs: at random in some episodes, the policy in the others.

    Args:
        policy: the policy.
        env: one of the envs, whose actions are drawn.
        episodes: which of them are random.
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
        if is_random.any():
            drawn = self._draw().reshape(*tensordict.batch_size, *self._spec.shape)
            if not is_random.all():
                planned = tensordict.get(self._action_key)
                rows = is_random.view(-1, *[1] * (planned.ndim - 1)).to(planned.device)
                drawn = torch.where(rows, drawn.to(planned.device), planned)
            tensordict.set(self._action_key, drawn.clone())
        return tensordict

    def _draw(self) -> torch.Tensor:
        """The random actions, ``[N, *A]``: new ones where those held have been kept long enough."""
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
    """The collector of a run: TorchRL's, over one real env or several, made when a run begins.

    Args:
        config: says how many envs, and where they run.
        source: what makes them.
        env: one of them, which acts itself where there is only one in this process.
        policy: what acts.
        device: where the policy is.
    """

    #: Read by TorchRL's Trainer: the random steps are ours.
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
        if not is_alone or config.evaluation_interval:
            another(source)  # refused now, not when the run has begun
        #: Where the envs are.
        self.episodes = Episodes(env, config.num_envs, carried_keys(policy))
        self.acting = Acting(policy, env, self.episodes, config.random_hold)
        self._source, self._env, self._device = source, env, device
        self._collector: Collector | None = None
        #: Called when the envs stand where the run goes on, before anything acts.
        self.on_begin: Callable[[], None] = lambda: None

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"episodes": self.episodes}

    def begin(self) -> None:
        """Begin the first episodes of a run, which are random."""
        everywhere = torch.ones(len(self.episodes), dtype=torch.bool)
        self.episodes.begin(everywhere, random=True)

    def count(self, steps: TensorDictBase, total: int) -> Steps:
        """Count the steps that were just made; ``total`` is how many there are with them."""
        ended = self.episodes.add(steps)
        lengths, random = self.episodes.lengths.clone(), self.episodes.random.clone()
        return Steps(steps, total, ended, lengths, random)

    def finished(self, steps: Steps, before: int) -> list[dict[str, Any]]:
        """End the episodes that ended; return a row of the metrics for each.

        Args:
            steps: the steps that were just made.
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
        processes = self.config.collector == "processes"  # which begin here
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
        """Return another real env like those of the run, as the policy needs it.

        Args:
            kwargs: for Gymnasium, such as ``render_mode``.
        """
        env = make_real_env(another(self._source), **self._settings(), **kwargs)
        return prepared(env, self.acting.policy)

    def _settings(self) -> dict[str, Any]:
        """The settings of each env."""
        config = self.config
        return {
            "seed": config.seed,
            "max_episode_steps": config.max_episode_steps,
            "action_repeat": config.action_repeat,
        }

    def _envs(self) -> EnvBase:
        config, number = self.config, len(self.episodes)
        # Of N envs, each has every N-th episode, whenever the others end theirs.
        firsts = (torch.arange(number) + number * self.episodes.finished).tolist()
        if number == 1 and config.collector == "single":
            episode_seeds(self._env).episode = firsts[0]
            return self._env
        common = {**self._settings(), "stride": number}
        settings = [
            {"env": another(self._source), "first_episode": first, **common}
            for first in firsts
        ]
        kind = ParallelEnv if config.collector == "processes" else SerialEnv
        return kind(number, make_real_env, create_env_kwargs=settings)


def prepared(env: EnvBase, policy: Any) -> EnvBase:
    """Return a real env with the entries that a policy carries from step to step."""
    if getattr(policy, "make_tensordict_primer", None) is None:
        return env
    # Zero at a reset of the whole env, of which it may have done flags of parts, too.
    primer = policy.make_tensordict_primer(reset_key=env.reset_keys[0])
    return TransformedEnv(env, primer.to("cpu"), auto_unwrap=False)


def carried_keys(policy: Any) -> list:
    """Return the entries that a policy hands on: what it reads, and writes there or under "next"."""
    read = set(policy.in_keys)
    return [key for key in policy.out_keys if strip_next(key) in read]


def _is_same(now: TensorDictBase, before: TensorDictBase) -> bool:
    """Whether observations are those that were recorded, NaN included."""
    return all(
        torch.equal(now.get(key).nan_to_num(), before.get(key).nan_to_num())
        for key in before.keys(True, True)
    )
