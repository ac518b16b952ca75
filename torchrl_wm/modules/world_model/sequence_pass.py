"""A component that filters whole sequences in one parallel pass, in place of the steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import NestedKey, TensorDictBase
from torch import nn

from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import join, strip_next, unique
from torchrl_wm.modules.world_model.filter_steps import FilterInputs, IS_INIT
from torchrl_wm.modules.world_model.flat import (
    FlatTensors,
    Placement,
    to_tensordict,
    where,
)
from torchrl_wm.modules.world_model.run_components import run_components
from torchrl_wm.modules.world_model.transition import Transition
from torchrl_wm.modules.world_model.wiring import written_keys


def check_sequence_module(
    sequence: nn.Module, transition: Transition, components: Mapping[str, nn.Module]
) -> None:
    """Refuse a sequence module whose keys or tensors are not those of the step.

    Raises:
        ValueError: if it reads what is not there, does not write what the step writes, or has
            parameters or buffers of its own.
    """
    encoded = written_keys(components["encoder"])
    there = [
        *transition.latents,
        *transition.context,
        *(join("next", k) for k in encoded),
        IS_INIT,
    ]
    unknown = [key for key in unique(sequence.in_keys) if key not in there]
    if unknown:
        raise ValueError(
            f"sequence reads {unknown}, and a sequence has {unique(there)}: latents and what the "
            f"step reads beside them, what the encoder makes of the next observations, and where "
            f"episodes begin."
        )
    missing = [key for key in transition.places if key not in written_keys(sequence)]
    if missing:
        raise ValueError(
            f"sequence must write what a step of the filter writes, and lacks {missing}. Its "
            f"out_keys are {written_keys(sequence)}."
        )
    shared = {
        id(t) for module in components.values() for t in _tensors(module).values()
    }
    own = [
        name for name, tensor in _tensors(sequence).items() if id(tensor) not in shared
    ]
    if own:
        raise ValueError(
            f"sequence has tensors of its own, {own[:5]}, and must be the same function as the "
            f"step: let it hold the modules of the components themselves."
        )


def run_sequence(
    sequence: nn.Module,
    transition: Transition,
    state: FlatTensors,
    inputs: FilterInputs,
    at: Placement,
) -> FlatTensors:
    """Filter sequences in one pass; the arguments and the result are those of ``filter_steps``.

    Args:
        sequence: reads ``[*B, T]`` entries and writes those of the step below "next".
        transition: the step; says which entries there are.
        state: the latents that the first step starts from, ``[*B, ...]``. Memory begins anew.
        inputs: ``[*B, T, ...]``.
        at: the batch size ``*B``, and the device.
    """
    state = {key: state[key] for key in transition.latents}
    fresh = inputs.fresh
    if fresh is not None:
        fresh = {key: fresh[key] for key in state}
    dim = len(at.batch_size)
    any_input = next(iter({**inputs.context, **inputs.encoded}.values()))
    size = torch.Size((*at.batch_size, any_input.shape[dim]))
    begins = inputs.begins
    if begins is None:
        begins = torch.zeros(size, dtype=torch.bool, device=any_input.device)
    # The latents of the first step say whether an episode begins there.
    begins = begins & (torch.arange(size[-1], device=begins.device) > 0)
    known = transition.known(inputs.encoded)
    given = {key: _beginning(value, size[-1], dim) for key, value in state.items()}
    for key, value in known.items():
        given[key] = _delayed(state[key], value, dim)
    if fresh is not None:
        given = where(begins, fresh, given)
    values = {**inputs.context, **inputs.encoded, **given}
    values[IS_INIT] = begins.unsqueeze(-1)
    whole = Placement(size, at.device)
    read = {key: values[key] for key in unique(sequence.in_keys)}
    out = run_components({"sequence": sequence}, to_tensordict(read, whole))
    written = {place: _written(out, place) for place in transition.places}
    roots = {}
    for key in state:
        roots[key] = given[key]
        if key not in known:
            roots[key] = _delayed(state[key], written[join("next", key)], dim)
    if fresh is not None:
        roots = where(begins, fresh, roots)
    return {**roots, **written}


def check_sequence(
    world_model: nn.Module,
    tensordict: TensorDictBase,
    *,
    rtol: float = 1e-4,
    atol: float = 1e-5,
) -> None:
    """Check that a model's ``sequence`` filters as its steps do.

    Both filter the same sequences; the results must be the same up to rounding. Modules that
    draw random numbers differ.

    Args:
        world_model: a :class:`~torchrl_wm.WorldModel` with a ``sequence``.
        tensordict: sequences, ``[*B, T]``, as for :meth:`~torchrl_wm.WorldModel.observe`; best
            with episodes that begin within them (``is_init``).

    Keyword Args:
        rtol, atol: the relative and the absolute tolerance of :func:`torch.isclose`.

    Raises:
        ValueError: if the model has no ``sequence``, or the two differ; the message names the
            entry, the first step that differs, and by how much.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from torchrl_wm import WorldModel
        >>> from torchrl_wm.modules import check_sequence
        >>> world_model = WorldModel(  # a running sum of what was seen
        ...     Mod(torch.nn.Identity(), ["observation"], ["seen"]),
        ...     Mod(lambda total, a: total, ["total", "action"], [("next", "total")]),
        ...     posterior=Mod(
        ...         lambda total, seen: total + seen,
        ...         [("next", "total"), ("next", "seen")],
        ...         [("next", "total")],
        ...     ),
        ...     initial_state={"total": torch.zeros(3)},
        ...     sequence=Mod(
        ...         lambda total, seen: total[:, :1] + seen.cumsum(1),
        ...         ["total", ("next", "seen")],
        ...         [("next", "total")],
        ...     ),
        ... )
        >>> data = TensorDict({
        ...     "observation": torch.randn(2, 5, 3), "action": torch.randn(2, 5, 1),
        ...     "next": {"observation": torch.randn(2, 5, 3)},
        ... }, [2, 5])
        >>> check_sequence(world_model, data)
    """
    sequence = world_model.sequence
    if sequence is None:
        raise ValueError(
            "The world model has no sequence to check: WorldModel(..., sequence=TensorDictModule("
            "...))."
        )
    with torch.no_grad():
        parallel = world_model.observe(tensordict)
        world_model.sequence = None
        try:
            steps = world_model.observe(tensordict)
        finally:
            world_model.sequence = sequence
    size = tensordict.batch_size
    for key in unique(steps.keys(True, True)):
        found, expected = parallel.get(key), steps.get(key)
        far = ~found.isclose(expected, rtol=rtol, atol=atol, equal_nan=True)
        if far.any():
            step = far.reshape(*size, -1).any(-1).reshape(-1, size[-1]).any(0)
            difference = (found.double() - expected.double()).abs().max()
            raise ValueError(
                f"sequence disagrees with the step: {key!r} differs from step "
                f"{int(step.int().argmax())} on, by {difference:.3g} at most. Both must compute "
                f"the same from the same modules; episodes begin where 'is_init' is True."
            )


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _beginning(first: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """Return the values of a first step, with zeros for the steps after it."""
    zeros = torch.zeros_like(first).unsqueeze(dim)
    rest = zeros.expand(*first.shape[:dim], length - 1, *first.shape[dim:])
    return torch.cat([first.unsqueeze(dim), rest], dim)


def _delayed(first: torch.Tensor, values: torch.Tensor, dim: int) -> torch.Tensor:
    """Return values one step later, after those of the first step."""
    earlier = values.narrow(dim, 0, values.shape[dim] - 1)
    return torch.cat([first.unsqueeze(dim), earlier], dim)


def _written(out: TensorDictBase, place: NestedKey) -> torch.Tensor:
    value = out.get(place, None)
    if value is None:
        raise MissingEntryError(
            f"sequence names {place!r} in its out_keys and does not write it; a step of the "
            f"filter does, as the next {strip_next(place)!r}."
        )
    return value
