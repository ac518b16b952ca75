"""Fill a replay buffer with imagined transitions while a Trainer runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.data import ReplayBuffer
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import TrainerHookBase

from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.envs.start_states import make_sampler, StartStates
from torchrl_wm.modules.modes import evaluation_mode
from torchrl_wm.trainers.settings import AtLeast


class ImaginedReplayHook(TrainerHookBase):
    """A hook that imagines from real start states after each round of training.

    After the optimisation steps on each collected batch the hook draws start
    states, imagines branched rollouts from them (MBPO, arXiv 1906.08253) with
    the current model, and puts the transitions into a replay buffer. Steps after
    the end of a trajectory are left out.

    Args:
        env: the imagined env, with a batch size of ``[]`` or ``[num_starts]``.
        replay_buffer: the buffer of imagined transitions, one per element.
        start_states: the states that rollouts start from: the replay buffer of real
            transitions, or anything else that
            :class:`~torchrl_wm.WorldModelEnv` takes as ``start_states``.

    Keyword Args:
        policy: the policy; random actions by default. It explores
            (:class:`~torchrl.envs.utils.ExplorationType` RANDOM).
        horizon: the number of imagined steps from each start.
        num_starts: how many starts to draw each time.
        interval: how many collected batches pass between two rounds of imagination.
        keys: the entries of imagined transitions to keep; all of them by default.

    Raises:
        ValueError: if a number is not positive, or ``num_starts`` does not fit
            the batch size of a batch-locked env.

    Examples:
        >>> import torch
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from torchrl.data import LazyTensorStorage, ReplayBuffer
        >>> from torchrl.envs import GymEnv
        >>> from torchrl.modules import MLP
        >>> from torchrl_wm import WorldModel, WorldModelEnv
        >>> from torchrl_wm.trainers import ImaginedReplayHook
        >>> real_env = GymEnv("Pendulum-v1")
        >>> world_model = WorldModel(
        ...     Mod(torch.nn.Identity(), ["observation"], ["observation"]),
        ...     Mod(MLP(4, 3, num_cells=[32]), ["observation", "action"], [("next", "observation")]),
        ...     Mod(MLP(4, 1, num_cells=[32]), ["observation", "action"], [("next", "reward")]),
        ... )
        >>> real = ReplayBuffer(storage=LazyTensorStorage(1_000), batch_size=32)
        >>> imagined = ReplayBuffer(storage=LazyTensorStorage(10_000), batch_size=256)
        >>> hook = ImaginedReplayHook(
        ...     WorldModelEnv(world_model, real_env), imagined, real, horizon=3, num_starts=100
        ... )
        >>> _ = real.extend(real_env.rollout(50))
        >>> hook()  # hook.register(trainer) lets the Trainer call it
        >>> len(imagined)
        300
    """

    def __init__(
        self,
        env: WorldModelEnv,
        replay_buffer: ReplayBuffer,
        start_states: StartStates,
        *,
        policy: Callable | None = None,
        horizon: int = 1,
        num_starts: int = 256,
        interval: int = 1,
        keys: Sequence[NestedKey] | None = None,
    ) -> None:
        numbers = {"horizon": horizon, "num_starts": num_starts, "interval": interval}
        for name, value in numbers.items():
            AtLeast(1).check(name, value)
        if not isinstance(env, WorldModelEnv) or not isinstance(
            replay_buffer, ReplayBuffer
        ):
            raise TypeError(
                f"ImaginedReplayHook takes a WorldModelEnv and the replay buffer to fill, got "
                f"{type(env).__name__} and {type(replay_buffer).__name__}."
            )
        if env.batch_locked and env.batch_size != (num_starts,):
            raise ValueError(
                f"num_starts={num_starts} does not fit an env of batch size "
                f"{tuple(env.batch_size)}. Make the env with batch_size=[] or [{num_starts}]."
            )
        self.env = env
        self.replay_buffer = replay_buffer
        self.policy = policy
        self.horizon = horizon
        self.num_starts = num_starts
        self.interval = interval
        self.keys = keys
        #: Imagined transitions written so far.
        self.imagined_frames = 0
        self._calls = 0
        self._sample_starts = make_sampler(start_states)

    @torch.no_grad()
    def __call__(self) -> None:
        """Imagine once, if it is due."""
        self._calls += 1
        if self._calls % self.interval:
            return
        starts = self._sample_starts(torch.Size([self.num_starts]))
        # Other entries of a real sample (log-probabilities, weights) do not hold for
        # what is imagined from it.
        starts = starts.select(*self.env.start_keys, strict=False)
        model = self.env.world_model
        with evaluation_mode(model), set_exploration_type(ExplorationType.RANDOM):
            imagined = self.env.imagine(self.horizon, self.policy, starts)
        valid = imagined.get(("collector", "mask"))
        imagined = imagined.exclude("collector")
        if self.keys is not None:
            imagined = imagined.select(*self.keys)
        transitions = imagined[valid]
        self.replay_buffer.extend(transitions)
        self.imagined_frames += len(transitions)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and the state of the imagined replay buffer."""
        return {
            "calls": self._calls,
            "imagined_frames": self.imagined_frames,
            "replay_buffer": self.replay_buffer.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._calls = state_dict["calls"]
        self.imagined_frames = state_dict["imagined_frames"]
        self.replay_buffer.load_state_dict(state_dict["replay_buffer"])

    def register(self, trainer: Trainer, name: str = "imagined_replay") -> None:
        """Have ``trainer`` call the hook after the optimisation steps of each batch."""
        trainer.register_op("post_steps", self)
        trainer.register_module(name, self)


def mixed_batches(
    sources: Sequence[tuple[ReplayBuffer | TensorDictBase, int, int]],
    updates: int,
    keys: Sequence[NestedKey],
) -> Iterator[TensorDictBase]:
    """Give batches that mix the rows of several sources, such as real and imagined ones.

    Args:
        sources: each a buffer or transitions ``[N]``, how many of its rows are in a batch, and
            among how many of its newest rows these are drawn.
        updates: how many batches.
        keys: the entries that batches have.
    """
    parts = []
    for buffer, size, among in sources:
        if size:
            rows = sample_newest(buffer, updates * size, among)
            parts.append(rows.select(*keys).reshape(updates, size))
    return iter(torch.cat(parts, 1).unbind(0))


def sample_newest(
    buffer: ReplayBuffer | TensorDictBase, number: int, among: int
) -> TensorDictBase:
    """Return ``number`` transitions, with replacement, of the ``among`` that were written last."""
    if not isinstance(buffer, ReplayBuffer):
        back = torch.randint(min(among, len(buffer)), (number,), device=buffer.device)
        return buffer[len(buffer) - 1 - back]
    if among >= len(buffer):
        return buffer.sample(number)
    # Not by buffer[...], which waits for the indices on the CPU.
    storage = buffer.storage
    back = torch.randint(among, (number,), device=storage.device)
    return storage[(buffer.write_count - 1 - back) % len(buffer)]
