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

from typing import TYPE_CHECKING

import torch
from tensordict import NestedKey, TensorDictBase

from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import (
    is_next,
    join,
    leaf_keys,
    missing_from,
    strip_next,
    unique,
)

if TYPE_CHECKING:
    from torchrl_wm.modules.world_model import WorldModel

IS_INIT = "is_init"


def begin(world_model: WorldModel, tensordict: TensorDictBase) -> TensorDictBase:
    """Encode observations, and complete the latents by the initial state.

    Latents that ``tensordict`` already has and the encoder does not write stay
    as they are. The tensordict is written to and returned.
    """
    _require(tensordict, unique(world_model.encoder.in_keys), "encode")
    tensordict = world_model.encoder(tensordict)
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
    posterior = world_model.posterior
    if any(is_next(key) for key in unique(posterior.in_keys)):
        work = predicted.empty().set("next", predicted.copy())
        corrected = posterior(work).get("next")
    else:
        corrected = posterior(predicted.copy())
    return corrected.select(*world_model.latent_keys)


def transition(
    world_model: WorldModel, step: TensorDictBase, encoded: TensorDictBase
) -> tuple[TensorDictBase, TensorDictBase]:
    """One step of the filter.

    Args:
        step: latents, action and context, ``[*B]``; not modified.
        encoded: what the encoder makes of the next observation, ``[*B]``.

    Returns:
        What dynamics and posterior write under "next", and the corrected latents.
    """
    posterior = world_model.posterior
    work = world_model.dynamics(step.copy())
    predicted = work.get("next")
    if posterior is None:
        written = [
            k for k in world_model.latent_keys if encoded.get(k, None) is not None
        ]
        state = predicted.select(*world_model.latent_keys).copy()
        return predicted, state.update(encoded.select(*written))
    keep = unique([*predicted.keys(True, True), *map(strip_next, posterior.out_keys)])
    predicted.update(encoded)
    if any(is_next(key) for key in unique(posterior.in_keys)):
        predicted = posterior(work).get("next")
    else:
        predicted = posterior(predicted)
    return predicted.select(*keep), predicted.select(*world_model.latent_keys)


def observe_step(world_model: WorldModel, tensordict: TensorDictBase) -> TensorDictBase:
    """Update the latents by the newest observation: the front of a policy.

    Args:
        tensordict: the observation, ``[*B, ...]``; the latents of the step
            before and the action taken then, if there was one; ``is_init``.

    Returns:
        The same tensordict with the latents of now.
    """
    latents = world_model.latent_keys
    inputs = unique(world_model.encoder.in_keys)
    _require(tensordict, inputs)
    fresh = _begun(world_model, tensordict.select(*inputs))
    before = [*latents, *_context(world_model)]
    if missing_from(tensordict, before):
        # Nothing was done yet: every row begins.
        return tensordict.update(fresh.select(*latents))
    encoded = world_model.encoder(tensordict.select(*inputs))
    encoded = encoded.select(*unique(world_model.encoder.out_keys))
    _, state = transition(world_model, tensordict.select(*before), encoded)
    restart = _restart(tensordict)
    if restart is not None:
        state = _where(restart, fresh, state)
    return tensordict.update(state)


def observe_sequence(
    world_model: WorldModel, tensordict: TensorDictBase
) -> TensorDictBase:
    """Filter whole sequences.

    Args:
        tensordict: transitions, ``[*B, T]``, with the observations at the root
            and under "next"; not modified. Latents at the root of the first
            step are where the filter starts, unless ``is_init`` says that an
            episode begins there.

    Returns:
        A tensordict, ``[*B, T]``, with the filtered latents at the root and
        what dynamics and posterior write under "next".
    """
    latents = world_model.latent_keys
    inputs = unique(world_model.encoder.in_keys)
    _require(tensordict, [*(join("next", k) for k in inputs), *_context(world_model)])
    restart = _restart(tensordict)
    given = not missing_from(tensordict, latents)
    # Where nothing restarts, only the first step has to be begun.
    starts = tensordict if restart is not None else tensordict[..., :1]
    begun = None
    if restart is not None or not given:
        begun = _begun(world_model, starts).select(*latents).unbind(-1)
    state = tensordict[..., 0].select(*latents) if given else begun[0]
    encoded = world_model.encoder(tensordict.get("next").select(*inputs))
    encodings = encoded.select(*unique(world_model.encoder.out_keys)).unbind(-1)
    steps = tensordict.select(*_context(world_model)).unbind(-1)
    filtered = []
    for t, (step, encoding) in enumerate(zip(steps, encodings)):
        if restart is not None:
            state = _where(restart[..., t], begun[t], state)
        step = step.copy().update(state)
        predicted, state = transition(world_model, step, encoding)
        filtered.append(step.select(*latents).set("next", predicted))
    out = tensordict.copy()
    return out.update(torch.stack(filtered, tensordict.batch_dims - 1))


def _begun(world_model: WorldModel, tensordict: TensorDictBase) -> TensorDictBase:
    """The latents at the beginning of an episode, whatever is known of it."""
    inputs = unique(world_model.encoder.in_keys)
    if not missing_from(tensordict, inputs):
        begun = begin(world_model, tensordict.select(*inputs))
    elif world_model.initial_state is not None:
        begun = world_model.initial_state(tensordict.batch_size, tensordict.device)
    else:
        begun = tensordict.empty()
    missing = missing_from(begun, world_model.latent_keys)
    if missing:
        raise MissingEntryError(
            f"Nothing says where the latents {missing} begin: the encoder does not write them, "
            f"the tensordict has {leaf_keys(tensordict)}, and the model's initial state gives "
            f"{[] if world_model.initial_state is None else world_model.initial_state.keys()}. "
            f"Pass WorldModel(..., initial_state=TensorDict({{...}}))."
        )
    return begun


def _context(world_model: WorldModel) -> list[NestedKey]:
    """What dynamics read beside latents: the action, and constant context."""
    latents = world_model.latent_keys
    keys = unique(world_model.dynamics.in_keys)
    return [key for key in keys if not is_next(key) and key not in latents]


def _restart(tensordict: TensorDictBase) -> torch.Tensor | None:
    """Where episodes begin, in the shape of the batch; None where nothing says so."""
    flag = tensordict.get(IS_INIT, None)
    return None if flag is None else flag.reshape(tensordict.batch_size)


def _where(
    mask: torch.Tensor, new: TensorDictBase, old: TensorDictBase
) -> TensorDictBase:
    """``new`` in the rows of ``mask``, ``[*B]``, else ``old``; the entries of ``old``."""
    out = old.copy()
    for key in unique(old.keys(True, True)):
        value = old.get(key)
        rows = mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim))
        out.set(key, torch.where(rows, new.get(key), value))
    return out


def _require(
    tensordict: TensorDictBase, keys: list[NestedKey], verb: str = "observe"
) -> None:
    missing = missing_from(tensordict, keys)
    if missing:
        raise MissingEntryError(
            f"WorldModel.{verb} reads {missing}, and the tensordict has "
            f"{leaf_keys(tensordict)}."
        )
