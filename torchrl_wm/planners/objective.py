"""What a plan is worth: its imagined steps, scored one after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase

from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import is_next, leaf_keys, unique
from torchrl_wm.modules.world_model.flat import FlatTensors
from torchrl_wm.planners.scores import Score
from torchrl_wm.planners.tally import Imagined
from torchrl_wm.planners.terminal import TerminalValue, value_key

#: The rows of a state, an action and the number of the step, to the next state, all entries
#: of the step, and where trajectories ended and terminated, ``[R]``; None if they cannot.
Step = Callable[[Any, torch.Tensor, int], tuple]


class Objective(ABC):
    """Imagines plans and scores them, with the value of where they end.

    Args:
        env: what predicts.
        action_key: the action that is planned.
    """

    #: The settings of the planner (:meth:`update`).
    score: Score
    discount: float = 1.0
    terminal_value: TensorDictModuleBase | None = None
    value_key: NestedKey | None = None
    policy: Callable | None = None
    action_block: int = 1
    #: What is in the tensordict only for the planner.
    ignored: Sequence[NestedKey] = ()

    def __init__(self, env: EnvBase, action_key: NestedKey) -> None:
        self.env = env
        self.action_key = action_key

    def update(self, **settings: Any) -> None:
        """Take over the planner's settings, which may have been replaced."""
        value = settings["terminal_value"]
        if value is not self.terminal_value:
            self.value_key = None if value is None else value_key(value)
        self.__dict__.update(settings)

    def prepare(self) -> tuple:
        """Look at what predicts and scores as it is now; all that a compiled plan depends on."""
        return tuple(score for _, score in self.score.terms)

    @abstractmethod
    def start(self, tensordict: TensorDictBase) -> Any:
        """Return the states that plans begin from, as rows ``[B]``, in a form that :meth:`repeat` takes."""

    @abstractmethod
    def repeat(self, state: Any, times: int) -> Any:
        """Each row ``times`` times in a row, ``[B * times]``."""

    @abstractmethod
    def stepper(self, state: Any) -> Step:
        """Return the function that makes one step after the other, from the rows of ``state`` on."""

    @abstractmethod
    def actor(self, state: Any) -> Callable[[Any, int], Any]:
        """Return the function that lets the policy act on rows of a state, given the number of the step."""

    @abstractmethod
    def select(self, rows: torch.Tensor, new: Any, old: Any) -> Any:
        """Return ``new`` in the ``rows``, ``[R]`` bool, else ``old``."""

    @abstractmethod
    def evaluate(self, state: Any) -> torch.Tensor:
        """Return the terminal value of states, ``[R, 1]``."""

    @abstractmethod
    def encode(
        self,
        tensordict: TensorDictBase,
        observations: Mapping[NestedKey, NestedKey],
    ) -> FlatTensors:
        """Return what the encoder makes of observations in ``tensordict``, by the entries that hold them."""

    def returns(self, state: Any, actions: torch.Tensor) -> torch.Tensor:
        """Return the scores ``[B, N]`` of plans ``[B, N, H, *A]`` from the rows ``[B * N]`` of ``state``."""
        lead = actions.shape[:2]
        sequence = self.held(actions.flatten(0, 1), 1)
        advance = self.stepper(state)
        tallies = [score.tally(weight) for weight, score in self.score.terms]
        value, going, scale = None, None, 1.0
        if self.terminal_value is not None:
            value = TerminalValue(self.evaluate, self.select)
        for step, action in enumerate(sequence):
            state, made, ended, terminated = advance(state, action, step)
            is_last = step + 1 == len(sequence)
            imagined = Imagined(made, going, ended, scale, is_last)
            for tally in tallies:
                tally.add(imagined)
            scale *= self.discount
            if value is not None:
                value.follow(state, scale, going, terminated)
            if ended is not None:
                going = ~ended if going is None else going & ~ended
        totals = [tally.scores(lead) for tally in tallies]
        total = sum(totals[1:], totals[0])
        return (total if value is None else total + value()).reshape(lead)

    def held(self, actions: torch.Tensor, dim: int) -> list[torch.Tensor]:
        """Return the actions of all steps in order: each one of a plan is held for a block."""
        return [
            action for action in actions.unbind(dim) for _ in range(self.action_block)
        ]

    def proposed(self, state: Any, horizon: int) -> torch.Tensor:
        """Return the actions of the policy from the rows of ``state`` on, ``[R, H, *A]``."""
        advance, act, actions = self.stepper(state), self.actor(state), []
        for number in range(horizon):
            state = act(state, number)
            action = state.get(self.action_key)
            actions.append(action)
            for step in range(self.action_block):
                state = advance(state, action, number * self.action_block + step)[0]
        return torch.stack(actions, 1)

    @abstractmethod
    def imagine(self, state: Any, actions: torch.Tensor) -> TensorDictBase:
        """Return the whole trajectories ``[R, H]`` of the actions ``[R, H, *A]``."""

    # What is read of a start ----------------------------------------------

    def start_entries(
        self, tensordict: TensorDictBase, known: Iterable[NestedKey]
    ) -> FlatTensors:
        """Return what scores, policy and value read beside a state, as rows ``[B]``.

        Args:
            tensordict: the states, ``[*B]``.
            known: the entries of a state, which scores may read, too.

        Raises:
            MissingEntryError: if a score reads an entry of the start that is not there.
        """
        made: dict[tuple, FlatTensors] = {}

        def encode(observations: Mapping[NestedKey, NestedKey]) -> FlatTensors:
            # Several scores may have one goal.
            if tuple(observations.items()) not in made:
                encoded = self.encode(tensordict, observations)
                made[tuple(observations.items())] = encoded
            return made[tuple(observations.items())]

        out: FlatTensors = {}
        for _, score in self.score.terms:
            out.update(score.begin(tensordict, encode))
        known = {*known, *out, self.action_key}
        for key in self._read_keys(tensordict, known):
            value = tensordict.get(key, None)
            if isinstance(value, torch.Tensor):
                out[key] = value
        for _, score in self.score.terms:
            roots = [key for key in score.in_keys or () if not is_next(key)]
            lacking = [key for key in roots if key not in known and key not in out]
            if lacking:
                raise MissingEntryError(
                    f"The score {score} reads {lacking}, and the tensordict has "
                    f"{leaf_keys(tensordict)}; a plan has {sorted(known, key=str)}, too. Set it "
                    f"beside the state: tensordict[{lacking[0]!r}] = ..., of the batch size "
                    f"{tuple(tensordict.batch_size)}."
                )
        size, dims = tensordict.batch_size.numel(), tensordict.batch_dims
        return {
            key: value.reshape(size, *value.shape[dims:]).to(self.env.device)
            for key, value in out.items()
        }

    def _read_keys(
        self, start: TensorDictBase, known: set[NestedKey]
    ) -> list[NestedKey]:
        """Return the entries to take over from a start."""
        keys: list[NestedKey] = []
        for _, score in self.score.terms:
            read = self.shown(start) if score.in_keys is None else score.in_keys
            keys += [key for key in read if not is_next(key)]
        modules = (self.policy, self.terminal_value)
        read = [key for m in modules for key in getattr(m, "in_keys", None) or []]
        read = [key for key in unique(read) if key not in known]
        if read:
            # A goal, but no observation, which would stand still.
            kept = self.shown(start)
            keys += [key for key in read if key in kept]
        return [key for key in unique(keys) if key not in known]

    def shown(self, start: TensorDictBase) -> list[NestedKey]:
        """Return the entries of a start that those may read who do not ask for one: no observations."""
        mine = {self.action_key, *self.ignored}
        return [k for k in unique(leaf_keys(start)) if not is_next(k) and k not in mine]
