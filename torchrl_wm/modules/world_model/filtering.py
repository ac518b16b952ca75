"""From observations to latents over time: encode, predict, correct.

Time runs as in any TorchRL data. With the observation ``o``, the action ``a`` and the
latent ``z``, one transition is ::

    root:   o_t      a_t      z_t          z_t: all that o_0..o_t and a_0..a_(t-1) tell
    next:   o_(t+1)           z_(t+1)

A step of the filter predicts ``z_(t+1)`` from ``(z_t, a_t)`` by the dynamics and corrects it
by ``o_(t+1)``: with a posterior, by what that writes; without one, by the latents that the
encoder writes. An episode begins at the initial state, corrected by its first observation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from tensordict import NestedKey, TensorDictBase

from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import is_next, join, leaf_keys, missing_from, unique
from torchrl_wm.modules.world_model.flat import FlatTensors, Placement, to_tensordict
from torchrl_wm.modules.world_model.recurrence import (
    contiguous,
    Inputs,
    RolloutCompiler,
    unroll_time,
    where,
)
from torchrl_wm.modules.world_model.run_components import run_components
from torchrl_wm.modules.world_model.transition import Transition
from torchrl_wm.modules.world_model.wiring import written_keys

if TYPE_CHECKING:
    from torchrl_wm.modules.world_model.world_model import WorldModel

IS_INIT = "is_init"


def begin(world_model: WorldModel, tensordict: TensorDictBase) -> TensorDictBase:
    """Encode observations, and complete the latents by the initial state.

    Latents that ``tensordict`` already has and the encoder does not write stay
    as they are. The tensordict is written to and returned.
    """
    _require(tensordict, unique(world_model.encoder.in_keys), "encode")
    tensordict = run_components({"encoder": world_model.encoder}, tensordict)
    absent = missing_from(tensordict, world_model.latent_keys)
    if not absent or world_model.initial_state is None:
        return tensordict
    initial = world_model.initial_state(tensordict.batch_size, tensordict.device)
    for key in absent:
        if initial.get(key, None) is not None:
            tensordict.set(key, initial.get(key))
    if world_model.posterior is not None:
        tensordict.update(_corrected(world_model, tensordict))
    return tensordict


def _corrected(world_model: WorldModel, predicted: TensorDictBase) -> TensorDictBase:
    """The latents that the posterior makes of predicted latents and an encoded observation.

    Args:
        predicted: both at the root; it is not modified.
    """
    posterior = {"posterior": world_model.posterior}
    if any(is_next(key) for key in unique(world_model.posterior.in_keys)):
        work = predicted.empty().set("next", predicted.copy())
        corrected = run_components(posterior, work).get("next")
    else:
        corrected = run_components(posterior, predicted.copy())
    return corrected.select(*world_model.latent_keys)


def transition_of(world_model: WorldModel) -> Transition:
    """The model's step on tensors, made anew where a component or network was replaced."""
    if torch.compiler.is_compiling():
        return Transition(world_model)  # the graph is guarded as the components are
    cached = world_model.__dict__.get("_transition_cache")
    if cached is None or not cached.is_for(world_model):
        cached = world_model.__dict__["_transition_cache"] = Transition(world_model)
    return cached


def check_observable(world_model: WorldModel) -> None:
    """Refuse to filter, step by step, latents that the env's observations overwrite.

    Raises:
        ValueError: if a recurrent model's latent is what its encoder reads.
    """
    inputs = unique(world_model.encoder.in_keys)
    shared = [key for key in world_model.latent_keys if key in inputs]
    if shared and world_model.is_recurrent:
        raise ValueError(
            f"The latents {shared} are what the encoder reads, too. In a running env the newest "
            f"observation stands there when the one before is needed. Give the latent a key of "
            f"its own: encoder=TensorDictModule(nn.Identity(), {shared}, ['latent'])."
        )


def observe_step(world_model: WorldModel, tensordict: TensorDictBase) -> TensorDictBase:
    """Update the latents by the newest observation: the front of a policy.

    Args:
        tensordict: the observation, ``[*B, ...]``; the latents of the step
            before and the action taken then, if there was one; ``is_init``.

    Returns:
        The same tensordict with the latents of now.
    """
    check_observable(world_model)
    latents = world_model.latent_keys
    inputs = unique(world_model.encoder.in_keys)
    _require(tensordict, inputs)
    fresh = _begun(world_model, tensordict.select(*inputs))
    if not world_model.is_recurrent:
        return tensordict.update(fresh.select(*latents))
    restart = episode_begins(tensordict)
    step = transition_of(world_model)
    missing = missing_from(tensordict, step.context)
    if missing_from(tensordict, latents) or missing:
        if not missing_from(tensordict, latents) and (
            restart is None or not restart.all()
        ):
            raise MissingEntryError(
                f"The latents go on from the step before, and what was done then is missing: "
                f"{missing}; the tensordict has {leaf_keys(tensordict)}. Keep the action at the "
                f"root, as env.rollout does: step_mdp(td, exclude_action=False); or say with "
                f"'is_init' (torchrl.envs.InitTracker) that every episode begins here."
            )
        return tensordict.update(fresh.select(*latents))
    encoded = world_model.encoder(tensordict.select(*inputs))
    at = Placement(tensordict.batch_size, tensordict.device)
    before, context = values_of(tensordict, latents), values_of(
        tensordict, step.context
    )
    values = step.predict(before, context, at)
    below = _below_next(values_of(encoded, written_keys(world_model.encoder)))
    _, state = step.correct(values, below, at)
    if restart is not None:
        state = where(restart, values_of(fresh, latents), state)
    for key, value in state.items():
        tensordict.set(key, value)
    return tensordict


def observe_sequence(
    world_model: WorldModel, tensordict: TensorDictBase
) -> TensorDictBase:
    """Filter whole sequences.

    Args:
        tensordict: transitions, ``[*B, T]``, with the observations at the root
            and under "next"; not modified. Latents at the root of the first
            step are where the filter starts, unless an episode begins there.

    Returns:
        A tensordict, ``[*B, T]``, with the filtered latents at the root and
        what dynamics and posterior write under "next".
    """
    latents = world_model.latent_keys
    inputs = unique(world_model.encoder.in_keys)
    step = transition_of(world_model)
    _require(tensordict, [*(join("next", k) for k in inputs), *step.context])
    if not tensordict.batch_dims or not tensordict.batch_size.numel():
        raise ValueError(
            f"observe filters sequences, [*B, T], and the tensordict has the batch size "
            f"{tuple(tensordict.batch_size)}."
        )
    state = first_latents(world_model, tensordict)
    restart, begun = episode_begins(tensordict), None
    if _may_begin(restart, slice(1, None)):
        begun = _begun(world_model, tensordict.select(*inputs, strict=False))
        begun = values_of(begun, latents)
    else:
        restart = None
    encoded = run_components(
        {"encoder": world_model.encoder}, tensordict.get("next").select(*inputs)
    )
    written = written_keys(world_model.encoder)
    given = Inputs(
        values_of(tensordict, step.context),
        _below_next(values_of(encoded, written)),
        restart,
        begun,
    )
    at = Placement(tensordict.batch_size[:-1], tensordict.device)
    filtered = unroll_time(step, state, given, at, compiler_of(world_model))
    return tensordict.copy().update(
        to_tensordict(filtered, Placement(tensordict.batch_size, tensordict.device))
    )


def predict_sequence(
    world_model: WorldModel, tensordict: TensorDictBase, keep: Iterable[NestedKey]
) -> TensorDictBase:
    """Predict whole sequences, open loop, from the latents of their first step.

    Args:
        tensordict: the first observations or latents, and what the dynamics
            read beside latents, ``[*B, T]``; not modified.
        keep: entries of it that the result has, too.

    Returns:
        A tensordict, ``[*B, T]``, with the predicted latents at the root, and what
        the dynamics write.
    """
    step = transition_of(world_model)
    state = first_latents(world_model, tensordict)
    given = Inputs(values_of(tensordict, step.context))
    at = Placement(tensordict.batch_size[:-1], tensordict.device)
    steps = unroll_time(step, state, given, at, compiler_of(world_model))
    kept = tensordict.select(*keep).apply(contiguous)  # heads see it beside the steps
    return kept.update(
        to_tensordict(steps, Placement(tensordict.batch_size, tensordict.device))
    )


def compiler_of(world_model: WorldModel) -> RolloutCompiler | None:
    """What compiles the model's steps through time, if it was asked to."""
    return world_model.__dict__.get("_rollout_compiler")


def first_latents(world_model: WorldModel, tensordict: TensorDictBase) -> FlatTensors:
    """The latents that a sequence starts from, ``[*B, ...]`` by key.

    What the encoder writes is encoded; the other latents are those given at the
    first step, or, where an episode begins there or none are given, what the
    model begins with.
    """
    latents = world_model.latent_keys
    inputs = unique(world_model.encoder.in_keys)
    first = tensordict[..., 0]
    known = first.select(*inputs, *latents, strict=False)
    state = known
    if missing_from(known, latents) or not missing_from(known, inputs):
        state = _begun(world_model, known)
    state = values_of(state, latents)
    restart = episode_begins(tensordict)
    if missing_from(first, latents) == latents or not _may_begin(restart, 0):
        return state
    fresh = _begun(world_model, first.select(*inputs, strict=False))
    return where(restart[..., 0], values_of(fresh, latents), state)


def episode_begins(
    tensordict: TensorDictBase, done: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Return where episodes begin, in the shape of the batch; None if nothing says so.

    ``is_init`` says so; without it, in a sequence, a ``done`` one step before.
    Where only agents have such entries, an episode begins when it does for all.

    Args:
        tensordict: ``[*B]``, or ``[*B, T]`` with "next".
        done: the ends of the episodes, if they stand under another key.
    """
    flag = _whole(tensordict, IS_INIT)
    if flag is not None:
        return flag
    next_td = tensordict.get("next", None)
    if next_td is None or not tensordict.batch_dims:
        return None
    ended = done if done is not None else _whole(next_td, "done")
    if ended is None:
        return None
    ended = ended.reshape(*tensordict.batch_size, -1).bool().any(-1)
    # Rolled, not written to a slice: torch 2.13's inductor makes C++ of that which does
    # not compile.
    later = torch.arange(ended.shape[-1], device=ended.device) > 0
    return ended.roll(1, -1) & later


def _may_begin(restart: torch.Tensor | None, steps: int | slice) -> bool:
    """Whether an episode begins at ``steps`` of ``restart``, ``[*B, T]``, as far as one can tell.

    What episodes begin with is drawn for every row: in vain where none begins, and other
    numbers come after it than in TorchRL's rollouts.
    """
    if restart is None:
        return False
    # To look would wait for any other device, and break a graph.
    if restart.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    return bool(restart[..., steps].any())


def _whole(tensordict: TensorDictBase, name: str) -> torch.Tensor | None:
    """The entry ``name``, at the root or, for all agents, below it: ``[*B]`` bool."""
    flag = tensordict.get(name, None)
    if flag is None:
        below = [
            tensordict.get(key)
            for key in unique(tensordict.keys(True, True))
            if isinstance(key, tuple) and key[-1] == name and key[0] != "next"
        ]
    else:
        below = [flag]
    if not below:
        return None
    size = tensordict.batch_size
    return torch.stack([x.bool().reshape(*size, -1).all(-1) for x in below]).all(0)


def _begun(world_model: WorldModel, tensordict: TensorDictBase) -> TensorDictBase:
    """The latents at the beginning of an episode, whatever is known of it."""
    inputs = unique(world_model.encoder.in_keys)
    if not missing_from(tensordict, inputs):
        begun = begin(world_model, tensordict.copy())
    elif world_model.initial_state is not None:
        begun = world_model.initial_state(tensordict.batch_size, tensordict.device)
        begun = begun.update(tensordict.select(*world_model.latent_keys, strict=False))
    else:
        begun = tensordict
    missing = missing_from(begun, world_model.latent_keys)
    if missing:
        raise MissingEntryError(
            f"Nothing says where the latents {missing} begin: the encoder does not write them, "
            f"the tensordict has {leaf_keys(tensordict)}, and the model's initial state gives "
            f"{[] if world_model.initial_state is None else world_model.initial_state.keys()}. "
            f"Pass WorldModel(..., initial_state=TensorDict({{...}}))."
        )
    return begun


def values_of(tensordict: TensorDictBase, keys: Iterable[NestedKey]) -> FlatTensors:
    """Entries of a tensordict, by flat key.

    Raises:
        KeyError: if one is not there.
    """
    return {key: tensordict[key] for key in keys}


def _below_next(values: FlatTensors) -> FlatTensors:
    return {join("next", key): value for key, value in values.items()}


def _require(
    tensordict: TensorDictBase, keys: list[NestedKey], verb: str = "observe"
) -> None:
    missing = missing_from(tensordict, keys)
    if missing:
        raise MissingEntryError(
            f"WorldModel.{verb} reads {missing}, and the tensordict has "
            f"{leaf_keys(tensordict)}."
        )
