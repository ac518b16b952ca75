"""The policy of the real envs: random actions in some episodes, the run's policy in others."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.data import Composite
from torchrl.envs import EnvBase, TransformedEnv

from torchrl_wm.modules.keys import strip_next
from torchrl_wm.trainers.evaluation import MAX_STEPS


class UnfinishedEpisodes(Protocol):
    """What is known of the episodes that go on in ``N`` envs.

    Attributes:
        lengths: how many steps they have, ``[N]``.
        random: those with random actions, ``[N]``.
        held: the random actions that are repeated, ``[N, *A]``.
    """

    lengths: torch.Tensor
    random: torch.Tensor
    held: torch.Tensor | None

    def __len__(self) -> int:
        ...


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
        episodes: UnfinishedEpisodes,
        hold: int = 1,
    ) -> None:
        super().__init__()
        self.in_keys, self.out_keys = list(policy.in_keys), list(policy.out_keys)
        self.policy, self.episodes, self.hold = policy, episodes, hold
        self._action_key = env.action_key
        self._spec = env.full_action_spec_unbatched[env.action_key]
        # Without a spec, a collector takes what differs from the policy's input for what it writes;
        # in a continued episode that may be nothing.
        self.spec = Composite({env.action_key: self._spec})

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
