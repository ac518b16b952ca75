"""One-step predictions of each member of an ensemble, against the truth."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase

from torchrl_wm.diagnostics.recording import (
    Episodes,
    FILTERED,
    imagine_particles,
    matching,
    Recording,
)
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import join, leaf_keys, missing_from, unique
from torchrl_wm.modules.modes import evaluation_mode
from torchrl_wm.modules.world_model.wiring import written_keys

LOC: NestedKey = ("next", "loc")
LOG_VAR: NestedKey = ("next", "log_var")


@torch.no_grad()
def one_step_prediction(
    env: WorldModelEnv,
    episodes: Episodes,
    *,
    targets: Sequence[NestedKey] | None = None,
    loc: NestedKey = LOC,
    log_var: NestedKey = LOG_VAR,
) -> TensorDict:
    """Predict the next step by each member of an ensemble, beside what came true.

    The Gaussians are those that the model's step writes, as
    :class:`~torchrl_wm.modules.EnsembleDynamics` and
    :class:`~torchrl_wm.modules.GaussianHead` do. A model that writes none counts as
    one member without a scale: the entries that :func:`open_loop_error` compares, and
    the reward, are compared.

    Args:
        env: an imagined env of batch size ``[]``.
        episodes: recorded transitions, ``[*B, T]``, or a list of them; padding is left out.
        targets: the entries below "next" that the Gaussians predict, in the order in
            which their dims join them; by default what the dynamics say, else the
            latents. For ``GaussianHead(..., ("next", "reward"))``:
            ``targets=["reward"], loc=("next", "reward_loc"), log_var=...``.
        loc, log_var: the entries of the means and log-variances, ``[*B, D]``, or
            ``[*B, E, D]`` for an ensemble.

    Returns:
        Batch size ``[M]``, the number of transitions:

        - ``("real", key)``: what was recorded, ``[M, *feature]``; for a predicted latent,
          the encoding of the next observation.
        - ``("loc", key)``: the members' means, ``[M, E, *feature]``.
        - ``("scale", key)``: their standard deviations, likewise; only if there are Gaussians.
        - ``("start", key)``: the value before the step, ``[M, *feature]``; not for
          rewards.

    Raises:
        ValueError: if the env is batch-locked, or the Gaussians have another size than
            the targets.
        KeyError: if actions or what is predicted were not recorded.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm import WorldModelEnv
        >>> from torchrl_wm.diagnostics import one_step_prediction
        >>> from torchrl_wm.models import make_ensemble_world_model
        >>> real_env = GymEnv("Pendulum-v1")
        >>> world_model, _ = make_ensemble_world_model(
        ...     real_env, members=5, hidden=(32,), normalize=False
        ... )
        >>> prediction = one_step_prediction(
        ...     WorldModelEnv(world_model, real_env), real_env.rollout(30)
        ... )
        >>> prediction["loc", "observation"].shape, prediction["scale", "reward"].shape
        (torch.Size([30, 5, 3]), torch.Size([30, 5, 1]))
    """
    recording = Recording.of(env, episodes, "one_step_prediction")
    rows = recording.transitions()
    predicted = stepped(recording, rows)
    means, log_vars = predicted.get(loc, None), predicted.get(log_var, None)
    if means is None:
        return _without_gaussians(recording, rows, targets)
    if targets is None:
        own = getattr(env.world_model.dynamics, "targets", None)
        targets = own if loc == LOC and own is not None else env.latent_keys
    targets = unique(targets)
    real = _targets(recording, rows, targets)
    out = TensorDict({}, batch_size=rows.batch_size, device=rows.device)
    for key in targets:
        out.set(join("real", key), real[key])
        before = predicted.get(key, None)
        if before is not None and key not in env.reward_keys:
            out.set(join("start", key), before)
    sizes = [prod(real[key].shape[1:]) for key in targets]
    if means.shape[-1] != sum(sizes):
        raise ValueError(
            f"The Gaussians under {loc!r} have {means.shape[-1]} dims, and the targets {targets} "
            f"have {sum(sizes)}. Name the entries that they predict: one_step_prediction(..., targets=[...])."
        )
    parts = {"loc": means}
    if log_vars is not None:
        parts["scale"] = (log_vars / 2).exp()
    for name, value in parts.items():
        value = value.unsqueeze(1) if value.ndim == 2 else value  # [M, E, D]
        for key, part in zip(targets, value.split(sizes, -1)):
            shape = (*part.shape[:-1], *real[key].shape[1:])
            out.set(join(name, key), part.reshape(shape))
    return out


def stepped(recording: Recording, rows: TensorDictBase) -> TensorDictBase:
    """Return what the model's step writes for steps of a recording, ``[M]``, which stay as they are."""
    model = recording.env.world_model
    given = rows.exclude("next", "collector", FILTERED).update(recording.state(rows))
    with torch.no_grad(), evaluation_mode(model):
        # The latents of a recurrent model are filtered already.
        if not model.is_recurrent or missing_from(given, model.latent_keys):
            given = model.encode(given.copy())
        return model.step(given.copy())


def gaussians(
    env: WorldModelEnv, prediction: TensorDictBase, name: str, members: bool = False
) -> list[NestedKey]:
    """Return the entries that Gaussians are predicted of.

    Raises:
        ValueError: if there are none, or no ``members`` where several are needed.
    """
    keys = unique(prediction.get("loc").keys(True, True))
    scales = prediction.get("scale", None)
    written = written_keys(env.world_model.dynamics)
    if scales is None and not members:
        raise ValueError(
            f"{name} needs predicted Gaussians, and the model's dynamics write {written}, neither "
            f"{LOC!r} nor {LOG_VAR!r}. make_ensemble_world_model(env) makes a model that has them; "
            f"others name theirs: {name}(..., loc=..., log_var=..., targets=[...])."
        )
    if members and prediction.get(join("loc", keys[0])).shape[1] < 2:
        raise ValueError(
            f"{name} needs the members of an ensemble, and the model's dynamics predict once "
            f"({written}). make_ensemble_world_model(env) makes an ensemble."
        )
    return keys


def elite_members(env: WorldModelEnv, members: int) -> torch.Tensor:
    """Return the numbers of the members that make predictions."""
    elites = getattr(env.world_model.dynamics, "elites", None)
    return torch.arange(members) if elites is None else elites.cpu()


def _without_gaussians(
    recording: Recording, rows: TensorDictBase, targets: Sequence[NestedKey] | None
) -> TensorDict:
    """Return single predictions in the form of an ensemble of one member."""
    windows = rows.unsqueeze(1)
    observed = recording.real(windows)
    real = {**observed, **recording.rewards(windows)}
    lacking = [key for key in unique(targets or ()) if key not in real]
    if lacking:
        raise MissingEntryError(
            f"The targets {lacking} are not among what can be compared: {list(real)}."
        )
    imagined = imagine_particles(recording, windows, 1)
    out = TensorDict({}, batch_size=rows.batch_size, device=rows.device)
    for key in unique(targets or real):
        predicted, true = matching(
            key, imagined.get(join("next", key))[0], real[key]
        )  # [M, 1, ...]
        out.set(join("real", key), true[:, 0])
        out.set(join("loc", key), predicted)
        if key in observed:
            before = rows.get(key, None)
            before = imagined.get(key)[0, :, 0] if before is None else before
            out.set(join("start", key), before.to(true.dtype))  # as its successor
    return out


def _targets(
    recording: Recording, rows: TensorDictBase, targets: list[NestedKey]
) -> dict[NestedKey, torch.Tensor]:
    """Return what was recorded of the targets; latents are encoded, as in the loss."""
    env, model = recording.env, recording.env.world_model
    encoded = [key for key in targets if key in env.latent_keys]
    real = {}
    if encoded:
        inputs = [join("next", key) for key in unique(model.encoder.in_keys)]
        missing = missing_from(rows, inputs)
        if missing:
            raise MissingEntryError(
                f"The next latents are the encodings of {missing}, which the episodes lack; they "
                f"have {leaf_keys(rows)}."
            )
        if model.is_recurrent:
            latents = rows.get(FILTERED)
        else:
            with evaluation_mode(model):
                latents = rows.get("next").select(*unique(model.encoder.in_keys))
                latents = model.encode(latents.copy())
        real = {key: latents.get(key) for key in encoded}
    for key in targets:
        if key in real:
            continue
        value = rows.get(join("next", key), None)
        if value is None:
            raise MissingEntryError(
                f"The model predicts {key!r}, and the episodes lack {join('next', key)!r}; they "
                f"have {leaf_keys(rows)}. Choose others: targets=[...]."
            )
        real[key] = value
    return real
