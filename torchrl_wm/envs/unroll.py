"""Many imagined steps: the one loop under ``rollout`` and ``imagine``, on flat tensors.

Each step is :meth:`StepKernel.stages <torchrl_wm.envs.step.StepKernel.stages>`. No
tensordict is made on the way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import NestedKey

from torchrl_wm.envs.endings import Endings
from torchrl_wm.envs.step import StepKernel
from torchrl_wm.modules.keys import is_next, join
from torchrl_wm.modules.world_model.flat import FlatTensors, Placement

#: Writes actions into the values of a step, given its number.
Act = Callable[[FlatTensors, int], None]
#: The recorded entries of several steps: by flat key, a list in the order of time.
Made = dict[NestedKey, list[torch.Tensor]]


def unroll(
    kernel: StepKernel,
    act: Act,
    values: FlatTensors,
    steps: int,
    at: Placement,
    stop: Callable[[FlatTensors], bool] | None = None,
) -> tuple[Made, FlatTensors]:
    """Make ``steps`` steps, or fewer if ``stop`` says so.

    Args:
        kernel: predicts a step.
        act: writes actions into the values that it is given.
        values: where to start: all root entries, and the memory, by flat key. Done entries
            that are never True may be missing, if nobody reads them. It is used up.
        steps: how many steps to make at most.
        at: the batch size ``*B`` and the device of the state.
        stop: looks at the entries of each step but the last.

    Returns:
        Lists of the entries of all steps, ``[*B, ...]`` by flat key: what each started from and
        what the policy wrote, and the kernel's
        :attr:`~torchrl_wm.envs.step.StepKernel.outputs`, which stand below "next"; and the
        memory after the last step, ``[*B, ...]``, which is handed on and not recorded.
    """
    layout = kernel.layout
    memory = {key: kernel.outputs[key] for key in layout.memory}
    never = layout.endings.never_keys
    if not never:
        endings = None  # the model or the time says how a step ends
    else:
        endings = {} if never.isdisjoint(values) else layout.endings.none(at)
    act(values, 0)
    kernel.check_actions(values, at)
    made = {key: [value] for key, value in values.items() if key not in memory}
    # A step hands on no rewards and no predictions, also those that the policy wrote.
    root = [k for k in values if not is_next(k) and k not in layout.reward_keys]
    for stage in kernel.stages(at, endings):
        stage(values, at)
    outputs = {k: place for k, place in kernel.outputs.items() if place in values}
    recorded = [place for key, place in outputs.items() if key not in memory]
    made.update({place: [values[place]] for place in recorded})
    columns = list(made.items())
    handed_on = [(key, outputs.get(key, key)) for key in root]
    at = at._replace(trusted=True)
    stages = kernel.stages(at, endings)
    program = getattr(act, "program", None)
    if program is not None:  # whose parts need no call around them
        stages = [*program.trusted, *stages]
    for step in range(1, steps):
        if stop is not None and stop(values):
            break
        values = {key: values[place] for key, place in handed_on}
        if program is None:
            act(values, step)
        for stage in stages:
            stage(values, at)
        for key, column in columns:
            column.append(values[key])
    return made, {key: values[place] for key, place in memory.items()}


def stacked(made: Made, endings: Endings, at: Placement) -> FlatTensors:
    """Return the entries of all steps, ``[*B, T, ...]`` by flat key.

    Done entries that are never True and were left out on the way are added.
    """
    dim = len(at.batch_size)
    flat = {key: torch.stack(column, dim) for key, column in made.items()}
    if any(key not in flat for key in endings.never_keys):
        whole = at._replace(batch_size=(*at.batch_size, len(next(iter(made.values())))))
        below = {join("next", k): flag for k, flag in endings.none(whole).items()}
        flat = {**endings.none(whole), **below, **flat}
    return flat


def imagined(
    kernel: StepKernel,
    act: Act | None,
    horizon: int,
    at: Placement,
    values: FlatTensors,
    actions: FlatTensors | None,
) -> tuple[FlatTensors, torch.Tensor, FlatTensors]:
    """Return a full horizon, on tensors only, which compiles to one graph.

    Args:
        kernel: predicts a step.
        act: acts; or None, with ``actions``.
        horizon: the number of steps ``H``.
        at: the batch size ``*B`` and the device of the state.
        values: where to start.
        actions: what to do, ``[*B, H, ...]`` by key.

    Returns:
        The entries of all steps, ``[*B, H, ...]`` by flat key; where trajectories have
        not ended before, ``[*B, H]`` bool; and the memory after the last step.
    """
    if act is None:
        act = replay(actions, len(at.batch_size))
    made, memory = unroll(kernel, act, dict(values), horizon, at)
    endings, size = kernel.layout.endings, at.batch_size
    if not endings.can_end:
        mask = torch.ones((*size, horizon), dtype=torch.bool, device=at.device)
        return stacked(made, endings, at), mask, memory
    ended = torch.zeros(size, dtype=torch.bool, device=at.device)
    valid = []
    for step in range(horizon):
        valid.append(~ended)
        flags = {key: made[kernel.outputs[key]][step] for key in endings.keys}
        ended = ended | endings.ended(flags, at)
    return stacked(made, endings, at), torch.stack(valid, len(size)), memory


def replay(actions: FlatTensors, dim: int) -> Act:
    """Return what takes given actions, ``[*B, H, ...]`` by key, one after the other."""
    sequences = {key: value.unbind(dim) for key, value in actions.items()}

    def act(values: FlatTensors, step: int) -> None:
        for key, sequence in sequences.items():
            values[key] = sequence[step]

    return act
