"""Many imagined futures of one real start, against what came true."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey, TensorDict

from torchrl_wm.diagnostics.recording import (
    CONTEXT,
    Episodes,
    imagine_particles,
    matching,
    positive,
    Recording,
)
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import join, unique


@torch.no_grad()
def prediction_fan(
    env: WorldModelEnv,
    episodes: Episodes,
    horizon: int,
    *,
    start: int | None = None,
    particles: int = 100,
    quantiles: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95),
    keys: Sequence[NestedKey] | None = None,
) -> TensorDict:
    """Imagine the recorded actions many times from one step, and see where the truth lies.

    A model that knows what it does not know has the truth within its fan. One that
    does not sample has a fan of no width.

    Args:
        env: an imagined env of batch size ``[]``.
        episodes: recorded transitions, ``[*B, T]``, time last, or a list of them:
            then ``*B`` is the number of rows.
        horizon: ``H``.
        start: the step of the episodes that imagination starts from, counted from 0. By default
            it is 0. For a recurrent model it is 4, after five frames to filter, or less if the
            episodes are too short for that.
        particles: ``P``, how many futures are imagined for each of the ``*B`` starts.
        quantiles: ``Q`` levels in [0, 1]; they are sorted.
        keys: which entries; by default all that can be compared.

    Returns:
        Batch size ``[*B, H]``; entry ``k - 1`` is ``k`` steps ahead. For every
        observation (or latent, as in :func:`open_loop_error`) and recorded reward:

        - ``("real", key)``: what was recorded, ``[*B, H, *feature]``.
        - ``("mean", key)``: the particles' mean, ``[*B, H, *feature]``.
        - ``("quantiles", key)``: ``[*B, H, Q, *feature]``.
        - ``("samples", key)``: the particles themselves, ``[*B, H, P, *feature]``.

        ``"level"`` has the levels of the quantiles, ``[*B, H, Q]``. ``"alive"`` is the share of
        the particles that have not ended before the step, ``[*B, H, 1]``; the others are
        predicted on. ``("collector", "mask")``, ``[*B, H]`` bool, is False where the recorded
        episode had ended.

    Raises:
        ValueError: if the horizon does not fit, a level is not in [0, 1], or
            nothing can be compared.
        KeyError: if the episodes lack actions.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm import WorldModelEnv
        >>> from torchrl_wm.diagnostics import prediction_fan
        >>> from torchrl_wm.models import make_ensemble_world_model
        >>> real_env = GymEnv("Pendulum-v1")
        >>> world_model, _ = make_ensemble_world_model(real_env, hidden=(32,), normalize=False)
        >>> env = WorldModelEnv(world_model, real_env)
        >>> fan = prediction_fan(env, real_env.rollout(30), horizon=8, particles=20)
        >>> fan.shape, fan["quantiles", "observation"].shape
        (torch.Size([8]), torch.Size([8, 5, 3]))
    """
    positive(particles, "particles")
    levels = torch.as_tensor(sorted(quantiles), dtype=torch.float32)
    if not len(levels) or not bool(((levels >= 0) & (levels <= 1)).all()):
        raise ValueError(
            f"quantiles must be levels between 0 and 1, got {list(quantiles)}."
        )
    recording = Recording.of(env, episodes, "prediction_fan")
    length = recording.steps.batch_size[1]
    if start is None:
        start = max(0, _first_start(recording, length - horizon))
    if horizon < 1 or start < 0 or start + horizon > length:
        raise ValueError(
            f"horizon={horizon} steps from start={start} on do not fit into episodes of {length} "
            f"steps (time is the last dim)."
        )
    windows = recording.steps[:, start : start + horizon]
    valid = recording.valid[:, start : start + horizon]
    if not valid[:, 0].all():
        rows = (~valid[:, 0]).nonzero().flatten().tolist()
        raise ValueError(
            f"Step {start} of the episodes {rows} is padding: ('collector', 'mask') is False "
            f"there. Leave them out, or take an earlier start."
        )
    done = recording.done[:, start : start + horizon].long()
    valid = valid & (done.cumsum(1) - done == 0)  # the step that ends it is valid
    real = {**recording.real(windows), **recording.rewards(windows)}
    lacking = [key for key in unique(keys or ()) if key not in real]
    if lacking:
        raise MissingEntryError(
            f"The keys {lacking} are not among what can be compared: {list(real)}."
        )
    imagined = imagine_particles(recording, windows, particles)  # [P, N, H]
    size = (*recording.batch_size[:-1], horizon)
    out = TensorDict({}, batch_size=size, device=recording.steps.device)
    for key in unique(real if keys is None else keys):
        samples = imagined.get(join("next", key)).movedim(0, 2)  # [N, H, P, ...]
        _, value = matching(key, samples[:, :, 0], real[key])
        samples = samples.to(value.dtype)
        drawn = samples.quantile(levels.to(samples), dim=2).movedim(0, 2)
        found = {
            "real": value,
            "mean": samples.mean(2),
            "quantiles": drawn,
            "samples": samples,
        }
        for name, entry in found.items():
            out.set(join(name, key), entry.reshape(*size, *entry.shape[2:]))
    alive = imagined.get(("collector", "mask")).float().mean(0)
    out.set("level", levels.to(alive).expand(*size, -1))
    out.set("alive", alive.reshape(*size, 1))
    return out.set(("collector", "mask"), valid.reshape(size))


def _first_start(recording: Recording, latest: int) -> int:
    """Return the step to start from if none is given, ``latest`` at most."""
    if not recording.env.world_model.is_recurrent:
        return 0
    shortest = int(recording.valid.sum(1).min())
    return min(CONTEXT, shortest, latest + 1) - 1
