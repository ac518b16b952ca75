"""Plans in any env, imagined by stepping it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from torchrl.envs import EnvBase

from torchrl_wm.modules.keys import as_tuple, join, sibling
from torchrl_wm.modules.world_model.flat import FlatTensors
from torchrl_wm.planners.objective import Objective, Step


class EnvObjective(Objective):
    """Predicts by stepping an env that takes tensordicts of any batch size."""

    def start(self, tensordict: TensorDictBase) -> TensorDictBase:
        state = tensordict.exclude("next", self.action_key, *self.ignored).reshape(-1)
        entries = self.start_entries(tensordict, self._state_keys(state))
        if self.env.device is not None:
            state = state.to(self.env.device)
        return state.update(entries)

    def _state_keys(self, state: TensorDictBase) -> set[NestedKey]:
        return {unravel_key(key) for key in state.keys(True, True)}

    def repeat(self, state: TensorDictBase, times: int) -> TensorDictBase:
        rows = state.unsqueeze(1).expand(state.shape[0], times)
        return rows.reshape(-1)

    def stepper(self, state: TensorDictBase) -> Step:
        def advance(state: TensorDictBase, action: torch.Tensor, step: int) -> tuple:
            made = self.env.step(state.copy().set(self.action_key, action))
            return (
                self.env.step_mdp(made),
                {unravel_key(k): value for k, value in made.items(True, True)},
                self._ended(made, "done"),
                self._ended(made, "terminated"),
            )

        return advance

    def actor(
        self, state: TensorDictBase
    ) -> Callable[[TensorDictBase, int], TensorDictBase]:
        return lambda state, step: self.policy(state.copy())

    def select(
        self, rows: torch.Tensor, new: TensorDictBase, old: TensorDictBase
    ) -> TensorDictBase:
        return torch.where(rows, new, old)

    def evaluate(self, state: TensorDictBase) -> torch.Tensor:
        return self.terminal_value(state.copy()).get(self.value_key)

    def encode(
        self,
        tensordict: TensorDictBase,
        observations: Mapping[NestedKey, NestedKey],
    ) -> FlatTensors:
        raise ValueError(
            f"The goals {list(observations.values())} are observations to encode, and a "
            f"{type(self.env).__name__} has no encoder: plan in a WorldModelEnv, or give the "
            f"goal as the entry that is compared."
        )

    def _ended(self, step: TensorDictBase, name: str) -> torch.Tensor:
        ended = torch.zeros(step.batch_size, dtype=torch.bool, device=step.device)
        for key in done_keys(self.env):
            flag = step.get(sibling(key, name), None)
            if flag is not None:
                ended = ended | flag.flatten(1).all(-1)
        return ended

    def imagine(self, state: TensorDictBase, actions: torch.Tensor) -> TensorDictBase:
        steps = []
        for action in actions.unbind(1):
            step = self.env.step(state.copy().set(self.action_key, action))
            steps.append(step)
            state = self.env.step_mdp(step)
        return torch.stack(steps, 1).refine_names(..., "time")


def done_keys(env: EnvBase) -> list[NestedKey]:
    """Return the ``done`` entries of a step that end a trajectory, as TorchRL's planners do.

    A group of done entries that has an ancestor is heard only through it.
    """
    keys = [key for key in map(as_tuple, env.done_keys) if key[-1] == "done"]
    groups = [key[:-1] for key in keys]

    def has_ancestor(group: tuple[str, ...]) -> bool:
        return any(len(o) < len(group) and group[: len(o)] == o for o in groups)

    return [join("next", key) for key in keys if not has_ancestor(key[:-1])]


def rewards_until_end(
    steps: TensorDictBase, reward_key: NestedKey, done_keys: Sequence[NestedKey]
) -> torch.Tensor:
    """Return the rewards of steps ``[R, T]``, with zeros after the step that ended each row."""
    reward = steps.get(reward_key)
    if not done_keys:
        return reward
    done = torch.stack([steps[key].expand_as(reward) for key in done_keys]).any(0)
    return torch.where(done.cumsum(1) > done, torch.zeros_like(reward), reward)
