"""The value of a model's doubt that little of the recorded data exceeds."""

from __future__ import annotations

from math import ceil

import torch
from tensordict import NestedKey, TensorDictBase
from torch import nn

from torchrl_wm._checks import positive_int
from torchrl_wm.modules.blocks.ensemble_dynamics import EnsembleDynamics
from torchrl_wm.modules.blocks.normalizer import valid_rows
from torchrl_wm.modules.blocks.penalty import measuring
from torchrl_wm.modules.blocks.penalty_heads import number
from torchrl_wm.modules.blocks.propagation import with_propagation
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import (
    is_next,
    join,
    leaf_keys,
    missing_from,
    strip_next,
    unique,
)
from torchrl_wm.modules.modes import evaluation_mode
from torchrl_wm.modules.world_model.run_components import run_components
from torchrl_wm.modules.world_model.wiring import written_keys
from torchrl_wm.modules.world_model.world_model import WorldModel


@torch.no_grad()
def data_limit(
    world_model: WorldModel,
    data: TensorDictBase,
    quantile: float = 0.99,
    *,
    measure: NestedKey = "disagreement",
    chunk: int = 4096,
) -> float:
    """Return the least value of a measure that a share of recorded transitions does not exceed.

    It is a ``limit`` for :func:`with_penalty`: what the model doubts more than nearly all data is
    where the data say nothing. Members that were trained on the transitions agree on them more
    than on others like them: transitions held out of training give the truer limit.

    Args:
        world_model: the model, after training.
        data: recorded transitions, ``[*B]``. Of them, what the model reads at the root is used:
            observations, or latents, and actions. Rows that ``("collector", "mask")`` calls
            invalid are left out.
        quantile: the share, above 0 and at most 1; 1 for the greatest value.

    Keyword Args:
        measure: as in :func:`with_penalty`.
        chunk: how many transitions the model sees at once. Memory beside the data is one float for
            each transition, and what the members say of a chunk.

    Returns:
        The limit, in units of the measure.

    Raises:
        KeyError: if observations or actions are missing.
        TypeError: if the quantile is no number.
        ValueError: if nothing writes the measure, if it is not finite on some transitions, if there
            are none, or if a number is out of bounds. A recurrent model needs filtered data:
            ``data_limit(world_model, world_model.observe(sequences))``.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm.models import make_ensemble_world_model
        >>> from torchrl_wm.modules import data_limit, fit_normalizers, with_penalty
        >>> real_env = GymEnv("Pendulum-v1")
        >>> world_model, loss = make_ensemble_world_model(real_env, members=3, hidden=(32,))
        >>> data = real_env.rollout(200)
        >>> fit_normalizers(world_model, data)
        >>> limit = data_limit(world_model, data, 0.95)
        >>> careful = with_penalty(world_model, 1.0, limit=limit)
    """
    number("quantile", quantile)
    if not 0 < quantile <= 1:
        raise ValueError(
            f"quantile={quantile} is a share of the data, above 0 and at most 1."
        )
    key = join("next", strip_next(measure))
    model = measuring(world_model, key)
    if isinstance(model.dynamics, EnsembleDynamics):
        model = with_propagation(model, "mean")  # draws no random numbers
    writers = _writers(model, key)
    rows = valid_rows(_read(model, writers, data)).reshape(-1)
    device = next((value.device for value in model.state_dict().values()), rows.device)
    found = []
    with evaluation_mode(model):
        for part in rows.split(positive_int("chunk", chunk)):
            part = part if device is None else part.to(device)
            state = part.copy()  # shallow: predictions are not written into the data
            if not _has_latents(model, state):
                state = model.encode(state)
            value = run_components(writers, state).get(key)
            # float64 stays: rounded, the limit might be below what it was read off.
            value = value.to(torch.promote_types(value.dtype, torch.float32))
            found.append(value.reshape(len(part), -1).amax(-1).cpu())
    values = torch.cat(found)
    wrong = int((~values.isfinite()).sum())
    if wrong:
        raise ValueError(
            f"The measure {key} is NaN or infinite on {wrong} of {len(values)} transitions. Leave "
            f"transitions out that are not finite, or look at the training of the model."
        )
    return values.kthvalue(max(1, ceil(quantile * len(values)))).values.item()


def _writers(model: WorldModel, measure: NestedKey) -> dict[str, nn.Module]:
    """Return the components that make the measure, by name; others might draw random numbers."""
    dynamics = {"dynamics": model.dynamics}
    if measure in written_keys(model.dynamics):
        return dynamics
    return {**dynamics, "reward_head": model.reward_head}


def _read(
    model: WorldModel, writers: dict[str, nn.Module], data: TensorDictBase
) -> TensorDictBase:
    """Return the entries that are read: only these are copied and moved.

    Raises:
        KeyError: if some are missing.
        ValueError: if the data cannot say what a step of the model begins from.
    """
    if model.memory_keys:
        raise ValueError(
            f"The model carries {model.memory_keys}, which no data hold: data_limit cannot tell "
            f"what it doubts in the middle of an episode."
        )
    read = unique(key for module in writers.values() for key in module.in_keys)
    read = [key for key in read if not is_next(key)]
    if not _has_latents(model, data):
        if model.is_recurrent:
            raise ValueError(
                f"The latents {model.latent_keys} of this model depend on all that was observed, "
                f"and the data have only observations. Filter sequences [*B, T] first: "
                f"data_limit(world_model, world_model.observe(sequences), ...)."
            )
        read = [key for key in read if key not in model.latent_keys]
        read = unique([*model.encoder.in_keys, *read])
    missing = missing_from(data, read)
    if missing:
        raise MissingEntryError(
            f"data_limit reads {read}, and the data lack {missing}; they have {leaf_keys(data)}."
        )
    return data.select(*read, ("collector", "mask"), strict=False)


def _has_latents(model: WorldModel, data: TensorDictBase) -> bool:
    return not missing_from(data, model.latent_keys)
