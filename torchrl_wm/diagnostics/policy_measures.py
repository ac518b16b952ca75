"""What a policy does in a model, beside the log: disagreement, distance, returns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDict

from torchrl_wm.diagnostics.logs import flat
from torchrl_wm.diagnostics.policy_study import PolicyStudy, study_of
from torchrl_wm.diagnostics.recording import Episodes, spread
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules import penalty_of
from torchrl_wm.modules.blocks.ensemble_dynamics import DISAGREEMENT
from torchrl_wm.modules.keys import join, unique

#: The quantiles of measures.
LEVELS = (0.05, 0.5, 0.95)

#: What is beyond this quantile of the data is called so.
EDGE = 0.99

#: How many distances are held in memory at once.
_DISTANCES_AT_ONCE = 4_000_000


def policy_disagreement(
    env: WorldModelEnv,
    policy: Callable,
    data: Episodes,
    horizon: int = 50,
    *,
    rollouts: int = 200,
    max_rows: int = 5000,
) -> TensorDict:
    """Measure the members' disagreement along what a policy does in a model, beside that in the data.

    The policy acts from where the recorded episodes begin. Where the members disagree more
    than on almost all recorded steps, the model has seen little like it. A policy that draws
    does so here as the exploration type around the call says.

    Args:
        env: an imagined env of batch size ``[]``, of a model whose step writes ``("next",
            "disagreement")``.
        policy: acts in the imagined env.
        data: the recorded transitions that the model has learnt from, ``[*B, T]``, or a
            list of them.
        horizon: ``H``.

    Keyword Args:
        rollouts: ``S``, how many. The beginnings of episodes take turns.
        max_rows: how many recorded steps are compared with at most, spread over the data.

    Returns:
        Batch size ``[]``:

        - ``"values"``: the disagreement, ``[S, H]``; NaN after the end of a rollout.
        - ``"quantiles"``: its 5 %, 50 % and 95 % quantiles at each step, ``[H, 3]``; NaN
          where all rollouts have ended.
        - ``"data_quantiles"``: those of the recorded steps, ``[3]``.
        - ``"edge"``: their 99 % quantile; a scalar.
        - ``"beyond"``: the share of the rollouts that are beyond it at each step, ``[H]``. Of
          recorded steps, it is 0.01. What is no number is beyond it.

    Raises:
        ValueError: if the model writes no disagreement, or has a memory.
        KeyError: if actions were not recorded, or the policy reads an entry that the imagined
            env does not have.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.envs import GymEnv
        >>> from torchrl.modules import MLP
        >>> from torchrl_wm import WorldModelEnv
        >>> from torchrl_wm.diagnostics import policy_disagreement
        >>> from torchrl_wm.models import make_ensemble_world_model
        >>> real_env = GymEnv("Pendulum-v1")
        >>> model, _ = make_ensemble_world_model(real_env, hidden=(32,), normalize=False)
        >>> policy = TensorDictModule(MLP(3, 1, num_cells=[32]), ["observation"], ["action"])
        >>> env = WorldModelEnv(model, real_env)
        >>> found = policy_disagreement(env, policy, real_env.rollout(30), horizon=10)
        >>> found["quantiles"].shape, found["beyond"].shape
        (torch.Size([10, 3]), torch.Size([10]))
    """
    kwargs = {"rollouts": rollouts, "max_rows": max_rows}
    study = study_of(env, policy, data, "policy_disagreement", horizon, **kwargs)
    return disagreement_of(study)


def policy_distance(
    env: WorldModelEnv,
    policy: Callable,
    data: Episodes,
    horizon: int = 50,
    *,
    rollouts: int = 200,
    max_rows: int = 5000,
) -> TensorDict:
    """Measure how far what a policy does in a model is from the data, beside the data's own gaps.

    The distance of an imagined latent and action is that to the nearest recorded ones: the root
    mean square over dims, in units of each dim's spread in the data; dims that never change
    there count in their own units. A recorded step is compared with those of other episodes (with all
    others, if there is one episode): its neighbours in time are always near.

    Args, keyword args and returns: as for :func:`policy_disagreement`; any model will do.

    Raises:
        ValueError: if nothing changes in the data, or it has a single step.
        KeyError: if actions or observations were not recorded, or the policy reads an entry
            that the imagined env does not have.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.envs import GymEnv
        >>> from torchrl.modules import MLP
        >>> from torchrl_wm import WorldModelEnv
        >>> from torchrl_wm.diagnostics import policy_distance
        >>> from torchrl_wm.models import make_ensemble_world_model
        >>> real_env = GymEnv("Pendulum-v1")
        >>> model, _ = make_ensemble_world_model(real_env, hidden=(32,), normalize=False)
        >>> policy = TensorDictModule(MLP(3, 1, num_cells=[32]), ["observation"], ["action"])
        >>> found = policy_distance(
        ...     WorldModelEnv(model, real_env), policy, real_env.rollout(30), horizon=10
        ... )
        >>> found["values"].shape, found["edge"] > 0
        (torch.Size([200, 10]), tensor(True))
    """
    kwargs = {"rollouts": rollouts, "max_rows": max_rows}
    study = study_of(env, policy, data, "policy_distance", horizon, **kwargs)
    return distance_of(study)


def policy_return(
    env: WorldModelEnv,
    policy: Callable,
    data: Episodes,
    horizon: int = 50,
    *,
    gamma: float = 0.99,
    coefficient: float | None = None,
    rollouts: int = 200,
    max_rows: int = 5000,
) -> TensorDict:
    """Measure what a model promises a policy over horizons, with and without a penalty.

    The penalised reward is ``r - coefficient * disagreement`` (MOPO, arXiv 2005.13239). Where
    both returns part, what the model promises comes from where it knows little.
    A model that was made by :func:`~torchrl_wm.modules.with_penalty` has its own measure and
    coefficient; its limit ends no rollout here.

    Args: as for :func:`policy_disagreement`.

    Keyword Args:
        gamma: the discount.
        coefficient: by default the model's own; without one, a disagreement at the data's 99 % quantile costs the
            standard deviation of the data's rewards.
        rollouts, max_rows: as for :func:`policy_disagreement`.

    Returns:
        Batch size ``[]``:

        - ``"return"``: the discounted return of each rollout over its first steps, ``[S, H]``.
          Nothing is earned after the end of one.
        - ``"penalised"``: the same with the penalty.
        - ``"coefficient"``: a scalar.

        The last two are missing if the model has no disagreement, or has a memory.

    Raises:
        KeyError: if actions were not recorded, or the policy reads an entry that the imagined
            env does not have.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.envs import GymEnv
        >>> from torchrl.modules import MLP
        >>> from torchrl_wm import WorldModelEnv
        >>> from torchrl_wm.diagnostics import policy_return
        >>> from torchrl_wm.models import make_ensemble_world_model
        >>> real_env = GymEnv("Pendulum-v1")
        >>> model, _ = make_ensemble_world_model(real_env, hidden=(32,), normalize=False)
        >>> policy = TensorDictModule(MLP(3, 1, num_cells=[32]), ["observation"], ["action"])
        >>> env = WorldModelEnv(model, real_env)
        >>> found = policy_return(env, policy, real_env.rollout(30), horizon=10)
        >>> bool((found["penalised"] <= found["return"]).all())
        True
    """
    kwargs = {"rollouts": rollouts, "max_rows": max_rows}
    kwargs.update(gamma=gamma, coefficient=coefficient)
    study = study_of(env, policy, data, "policy_return", horizon, **kwargs)
    return returns_of(study)


@torch.no_grad()
def disagreement_of(study: PolicyStudy) -> TensorDict:
    """Return the disagreement of a study; see :func:`policy_disagreement`."""
    key = join("next", DISAGREEMENT)
    imagined = study.along.get(DISAGREEMENT)
    memory = study.env.world_model.memory_keys
    if imagined is None and memory:
        raise ValueError(
            f"the model carries {memory}, which rollouts do not record: what its step says of its "
            f"doubts is not known along them. Distances to the data are: policy_distance."
        )
    if imagined is None:
        raise ValueError(
            f"the model writes no {key!r}: it is no ensemble, or runs one member at a time. "
            f"make_ensemble_world_model(env) makes one; with_propagation(world_model, 'ts1') lets "
            f"all members of it predict."
        )
    recorded = study.predicted.get(key).reshape(-1)
    return _beside(imagined, recorded, study.alive)


@torch.no_grad()
def distance_of(study: PolicyStudy) -> TensorDict:
    """Return the distances of a study; see :func:`policy_distance`."""
    env, recording = study.env, study.recording
    keys = unique([*env.latent_keys, *env.action_keys])
    rows = study.latents[recording.valid]
    episodes = recording.episodes[recording.valid]
    chosen = spread(len(rows), study.max_rows).to(episodes.device)
    data, episodes = flat(rows[chosen], keys), episodes[chosen]
    unit = data.std(0, unbiased=False)
    moves = unit > 1e-6 * (1 + data.abs().mean(0))
    if not moves.any() or len(data) < 2:
        raise ValueError("nothing changes in the data: there is no unit of distance.")
    # What never changes there and does in the policy's actions is far, too.
    unit = torch.where(moves, unit, 1.0)
    data, steps = data / unit, flat(study.imagined.flatten(), keys) / unit
    found = nearest_distances(steps, data).reshape(study.alive.shape)
    own = episodes
    if len(episodes.unique()) == 1:
        own = torch.arange(len(data), device=data.device)
    some = spread(len(data), 2000).to(data.device)
    return _beside(
        found, nearest_distances(data[some], data, own[some], own), study.alive
    )


@torch.no_grad()
def returns_of(study: PolicyStudy) -> TensorDict:
    """Return the returns of a study; see :func:`policy_return`."""
    env, imagined, alive = study.env, study.imagined, study.alive
    discount = study.gamma ** torch.arange(study.horizon, device=alive.device)

    def total(value: torch.Tensor) -> torch.Tensor:
        return torch.where(alive, value * discount, 0.0).cumsum(1).cpu()

    def rewards(steps: TensorDict) -> torch.Tensor:
        parts = [
            steps.get(join("next", key)).reshape(*steps.shape, -1)
            for key in env.reward_keys
        ]
        return torch.cat(parts, -1).sum(-1)

    reward = rewards(imagined)
    out = TensorDict({"return": total(reward)}, batch_size=[])
    doubt, coefficient = study.along.get(study.measure), study.coefficient
    if doubt is None:
        return out
    own = penalty_of(env.world_model)
    if coefficient is None and own is not None:
        coefficient = own.coefficient
    if coefficient is None:
        edge = _quantile(study.predicted.get(join("next", study.measure)), EDGE)
        recorded = list(study.recording.rewards(study.some).values())
        known = (
            torch.cat([r.reshape(len(r), -1) for r in recorded], -1)
            if recorded
            else reward.flatten(0)[:, None]
        )
        coefficient = float(known.sum(-1).std() / edge) if edge > 0 else 0.0
    payers = 1 if own is None else _payers(study)
    out.set("penalised", total(reward - coefficient * payers * doubt))
    return out.set("coefficient", torch.tensor(coefficient))


def _payers(study: PolicyStudy) -> float:
    """Return how many of a penalised model's rewards pay for one number of the measure."""

    def size(key) -> int:
        return study.predicted.get(key)[0].numel()

    penalties = study.env.world_model.reward_head[-1].penalties
    return sum(map(size, penalties)) / size(join("next", study.measure))


def nearest_distances(
    queries: torch.Tensor,
    data: torch.Tensor,
    own: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the distance of each query to the nearest row, the root mean square over dims.

    Args:
        queries: ``[Q, D]``.
        data: ``[M, D]``.
        own: the group of each query, ``[Q]``, whose rows do not count.
        groups: those of the rows, ``[M]``.
    """
    # Far from zero, the squares that distances are made of would drown them.
    middle = data.mean(0)
    queries, data = queries - middle, data - middle
    out = []
    at_once = max(1, _DISTANCES_AT_ONCE // len(data))
    for first in range(0, len(queries), at_once):
        part = slice(first, first + at_once)
        distances = torch.cdist(queries[part], data)
        if own is not None:
            distances.masked_fill_(own[part, None] == groups, torch.inf)
        out.append(distances.amin(1))
    return torch.cat(out) / data.shape[1] ** 0.5


def _beside(
    values: torch.Tensor, data: torch.Tensor, alive: torch.Tensor
) -> TensorDict:
    """Return imagined values ``[S, H]`` beside those of recorded steps, ``[M]``."""
    values = torch.where(alive, values.float(), torch.nan)
    edge = _quantile(data, EDGE)
    beyond = (alive & ~(values <= edge)).sum(0) / alive.sum(0)
    levels = torch.tensor(LEVELS, device=values.device)
    return TensorDict(
        {
            "values": values,
            "quantiles": values.nanquantile(levels, 0).mT,
            "data_quantiles": torch.stack([_quantile(data, q) for q in LEVELS]),
            "edge": edge,
            "beyond": beyond,
        },
        batch_size=[],
    ).cpu()


def _quantile(values: torch.Tensor, level: float) -> torch.Tensor:
    return values.flatten().float().quantile(level)
