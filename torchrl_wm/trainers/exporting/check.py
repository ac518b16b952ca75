"""Exported policies compared with the run's own ``act``, on observations of its env or its log."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import step_mdp

from torchrl_wm.modules.keys import join
from torchrl_wm.trainers.evaluation import forked_random
from torchrl_wm.trainers.exporting.draws import GivenDraws
from torchrl_wm.trainers.exporting.forms import shown_env
from torchrl_wm.trainers.exporting.program import PolicyProgram, Port
from torchrl_wm.trainers.policies import Policy, Seat
from torchrl_wm.trainers.trainer import RecipeTrainer

#: Called with inputs ``[B, ...]`` by name; returns outputs by name.
Runner = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
#: What stands for a draw: its kind, and how many numbers a row has.
_Drawn = dict[tuple[str, int], torch.Tensor]


class RecordedStep(NamedTuple):
    """A step of the run's own policy.

    Args:
        inputs: the inputs of the exported policy but for what is carried, ``[1, ...]``.
        action: the action that ``act`` returned.
    """

    inputs: dict[str, torch.Tensor]
    action: np.ndarray


def record(
    policy: Policy, program: PolicyProgram, steps: int, seed: int
) -> list[RecordedStep]:
    """Return steps of a run's policy, from the first one of an episode on.

    They are made in the real env, or along held-out episodes of the log if the run has no env.

    Each draw is replaced by one that is recorded. All random states are left as they were.

    Args:
        policy: the run's policy.
        program: what is exported.
        steps: how many steps. An episode that ends before them is followed by another.
        seed: the seed of the env and the draws.
    """
    found: list[RecordedStep] = []
    # Each observation is acted on, also where the run repeats its actions.
    repeat, policy.action_repeat = policy.action_repeat, 1
    walk = _in_log if not policy.trainer.recipe.has_real_env else _in_env
    with forked_random(seed), closing(walk(policy.trainer, seed, repeat)) as states:
        state, begins = next(states)
        while True:
            if begins:
                policy.reset()
            drawn: _Drawn = {}
            with GivenDraws(partial(_given, drawn)):
                (seat,) = policy.act_on(None, [state])
            found.append(_step(program, seat, state, drawn, begins))
            if len(found) == steps:
                return found
            state, begins = states.send(seat.handed)


#: Gives observations, and whether an episode begins with them; is sent the action on them.
_Walk = Generator[tuple[TensorDictBase, bool], torch.Tensor, None]


def _in_env(trainer: RecipeTrainer, seed: int, repeat: int) -> _Walk:
    """Walk through episodes of the real env, with each action for some steps."""
    real = trainer.make_env()
    try:
        env = shown_env(real)
        keys = [*env.observation_spec.keys(True, True)]
        env.set_seed(seed)
        while True:
            state, begins, over = env.reset(), True, False
            while not over:
                action = yield state.select(*keys), begins
                state, over = _stepped(env, state, action, repeat)
                begins = False
    finally:
        real.close()


def _in_log(trainer: RecipeTrainer, seed: int, repeat: int) -> _Walk:
    """Walk along recorded episodes, from the first again after the last, whatever the actions."""
    keys = [*shown_env(trainer.env).observation_spec.keys(True, True)]
    while True:
        for episode in trainer.recipe.held_out_episodes():
            for step, state in enumerate(episode.select(*keys).cpu().unbind(0)):
                yield state, step == 0


def _stepped(
    env: EnvBase, state: TensorDictBase, action: torch.Tensor, times: int
) -> tuple[TensorDictBase, bool]:
    """Return the state after some steps with one action, and whether the episode has ended."""
    for _ in range(times):
        step = env.step(state.set(env.action_key, action))
        state = step_mdp(step)
        if any(step.get(join("next", key)).any() for key in env.done_keys):
            return state, True
    return state, False


def _given(
    drawn: _Drawn, kind: str, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    """Return a draw: the same for all of its kind and size in a step."""
    place = kind, torch.Size(shape).numel()
    if place not in drawn:
        make = torch.rand if kind == "uniform" else torch.randn
        drawn[place] = make(place[1])
    return drawn[place].reshape(shape).to(dtype)


def _step(
    program: PolicyProgram,
    seat: Seat,
    state: TensorDictBase,
    drawn: _Drawn,
    begins: bool,
) -> RecordedStep:
    shown = seat.observed if program.surroundings.outside else state
    inputs = {}
    for port in program.inputs:
        if port.kind == "observation":
            inputs[port.name] = shown.get(port.key).unsqueeze(0).clone()
        elif port.kind == "is_init":
            inputs[port.name] = torch.tensor([begins])
        elif port.draw is not None:
            inputs[port.name] = _row(port, drawn)
    form = program.surroundings.action_form
    if program.surroundings.outside:
        action = seat.acted.get(program.action_key).numpy()
    elif form.space is None:
        action = seat.handed.numpy()
    else:
        action = seat.action if form.entry is None else seat.action[form.entry]
    return RecordedStep(inputs, np.array(action))


def _row(port: Port, drawn: _Drawn) -> torch.Tensor:
    """Return the draw of a step; one that the policy did not make there is arbitrary."""
    size = torch.Size(port.shape).numel()
    value = _given(drawn, port.kind, (size,), port.dtype)
    return value.reshape(1, *port.shape)


def deviation(
    run: Runner, steps: Sequence[RecordedStep], program: PolicyProgram
) -> float:
    """Return the largest difference of an exported policy's actions from those of ``act``.

    That of a number is relative to it where it is above 1; that of a choice is 0 or 1. What the
    policy carries, it carries by itself. All steps are also made once as one batch.

    Args:
        run: the exported policy.
        steps: the steps of the run's policy.
        program: what is exported.
    """
    worst, rows = 0.0, []
    state = {
        port.name: torch.zeros(1, *port.shape, dtype=port.dtype)
        for port in program.inputs
        if port.kind == "carried"
    }
    for step in steps:
        inputs = {**step.inputs, **state}
        out = run(inputs)
        rows.append(inputs)
        worst = max(worst, _difference(out["action"], step.action[None]))
        state = {name: out[output] for name, output in program.carried.items()}
    batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    actions = np.stack([step.action for step in steps])
    return max(worst, _difference(run(batch)["action"], actions))


def _difference(found: torch.Tensor, expected: np.ndarray) -> float:
    found = found.detach().cpu().numpy()
    if found.shape != expected.shape:
        raise ValueError(
            f"The exported policy returns actions of the shape {found.shape}, and the run's own "
            f"act {expected.shape}."
        )
    if not np.issubdtype(expected.dtype, np.floating):
        return float((found != expected).any())
    away = np.abs(found - expected) / np.maximum(1, np.abs(expected))
    return float(np.nan_to_num(away, nan=np.inf).max())
