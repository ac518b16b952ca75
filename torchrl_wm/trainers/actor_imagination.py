"""The imagination that Dreamer's actor learns from."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from torchrl_wm.modules import ContinuationModel, TwoHotHead, WorldModel
from torchrl_wm.modules.world_model.compiling import Compiler
from torchrl_wm.modules.world_model.flat import (
    FlatTensors,
    Placement,
    to_flat,
    to_tensordict,
)
from torchrl_wm.modules.world_model.program import Program
from torchrl_wm.modules.world_model.run_components import run_components


class Imagination(nn.Module):
    """The imagined env that an actor's loss asks for: steps first, then judged all at once.

    A :class:`~torchrl_wm.WorldModelEnv` predicts rewards and ends at each step. An actor's loss
    needs them, and the values of all states, only after the last one.

    Args:
        world_model: the model.
        critic: the values.
        differentiable: whether gradients flow back through the steps into the actions.
    """

    def __init__(
        self, world_model: WorldModel, critic: TensorDictModule, differentiable: bool
    ) -> None:
        super().__init__()
        self.world_model = world_model
        # Not a submodule: the actor's loss holds the parameters of its env fixed.
        self.__dict__["critic"] = critic
        self.continuation = None
        if world_model.done_head is not None:
            self.continuation = ContinuationModel(world_model)
        self.differentiable = differentiable
        #: The logits of the values of the states that the newest steps began in, ``[N, H, bins]``,
        #: with their graph; None for a critic of plain numbers.
        self.value_logits: torch.Tensor | None = None
        self._acting = Program([])
        self._compiler: Compiler | None = None

    def reset(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the latents to begin from."""
        return tensordict

    def rollout(
        self, max_steps: int, policy: nn.Module, tensordict: TensorDictBase, **_: Any
    ) -> TensorDictBase:
        """Return steps of a policy, ``[N, H]``, with what they are worth.

        Beside latents and actions there are ``("next", "reward")``; ``"state_value"`` and
        ``"continuation"``, at the root and below "next".
        """
        with nullcontext() if self.differentiable else torch.no_grad():
            states, acted = self.steps(max_steps, policy, tensordict)
            self._judge(states)
            if self.continuation is not None:
                self.continuation(states)
            # Both ends of a step are views of the same states.
            steps = acted.update(states[:, :-1]).set("next", states[:, 1:])
            heads = {"reward_head": self.world_model.reward_head}
            return run_components(heads, steps)

    def _judge(self, states: TensorDictBase) -> None:
        """Write the values of states ``[N, H + 1]``, and keep what the critic learns them from."""
        head = self.critic.module
        if not isinstance(head, TwoHotHead):
            self.critic(states)
            return
        with torch.enable_grad():
            logits = head.network(*(states[key] for key in self.critic.in_keys))
            self.value_logits = logits[:, :-1]
        states["state_value"] = head.two_hot(logits.detach())

    def compile_steps(self) -> None:
        """Make a graph of a step, which all steps after the first run."""
        self._compiler = Compiler({}, "An update", "compile=False")

    def steps(
        self, number: int, policy: nn.Module, start: TensorDictBase
    ) -> tuple[TensorDictBase, TensorDictBase]:
        """Return latents, ``[N, H + 1]``, and the actions between them, ``[N, H]``."""
        transition = self.world_model.filter.transition
        at = Placement(start.batch_size, start.device)
        if not self._acting.is_for(policy):
            self._acting = Program([policy])
        acting = self._acting

        def step(state: FlatTensors, at: Placement) -> tuple[FlatTensors, FlatTensors]:
            values = dict(state)
            acting(values, at)
            now = {key: values[key] for key in (*state, *transition.context)}
            values = transition.imagine(state, now, at)
            return now, {key: values[place] for key, place in transition.state}

        state, made = to_flat(start, self.world_model.latent_keys), []
        now, state = step(state, at)
        made.append(now)
        at = at._replace(trusted=True)
        if self._compiler is not None:
            models = (transition, acting)
            step = self._compiler.wrap(step, models, (), (at, tuple(state)))
        for _ in range(number - 1):
            now, state = step(state, at)
            made.append(now)
        states = {
            key: torch.stack([*(now[key] for now in made), last], 1)
            for key, last in state.items()
        }
        acted = {
            key: torch.stack([now[key] for now in made], 1)
            for key in made[0].keys() - state.keys()
        }
        return tuple(
            to_tensordict(flat, Placement((*start.batch_size, size), start.device))
            for flat, size in ((states, number + 1), (acted, number))
        )


def recalled(key: str) -> TensorDictModule:
    """Return a module that leaves an entry as the imagination wrote it."""
    return TensorDictModule(nn.Identity(), [key], [key])
