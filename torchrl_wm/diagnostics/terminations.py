"""Terminations: compare predicted with real ends of episodes."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import InteractionType, set_interaction_type

from torchrl_wm.diagnostics.recording import Episodes, imagine_particles, Recording
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules import without_penalty
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import as_tuple, join, leaf_keys, sibling
from torchrl_wm.modules.world_model.wiring import written_keys

#: The entries of a head that says when an episode ends.
_ENDINGS = {"terminated", "terminated_logits", "continue_pred", "done"}


@torch.no_grad()
def termination_metrics(env: WorldModelEnv, episodes: Episodes) -> TensorDict:
    """Measure precision and recall of predicted terminations, one step ahead.

    The prediction is what the imagined env would do: the head's decision at its own
    threshold, on the state that the model predicts. The truth is ``terminated``, else
    ``done & ~truncated``, else ``done``: a time limit is not a termination. Nor is the limit of
    :func:`~torchrl_wm.modules.with_penalty`, which is left out.

    Args:
        env: an imagined env of batch size ``[]``.
        episodes: recorded transitions, ``[*B, T]``, or a list of them; padding is left out.

    Returns:
        Batch size ``[]``, scalars. If the env has several done entries, those of each
        are in its group (``("agents", "recall")``):

        - ``precision``: the share of the predicted terminations that is right.
        - ``recall``: the share of the real terminations that is predicted.
        - ``f1``: their harmonic mean.
        - ``base_rate``, ``predicted_rate``: the share of steps that terminate, and the
          share of steps that are predicted to.
        - ``true_positives``, ``false_positives``, ``false_negatives``,
          ``true_negatives``: int64 counts.

        A share of nothing is NaN.

    Raises:
        ValueError: if the model predicts no terminations.
        KeyError: if actions or ends were not recorded.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm import WorldModelEnv
        >>> from torchrl_wm.diagnostics import termination_metrics
        >>> from torchrl_wm.models import make_mlp_world_model
        >>> real_env = GymEnv("CartPole-v1")
        >>> world_model, _ = make_mlp_world_model(real_env, hidden=(32,), normalize=False)
        >>> metrics = termination_metrics(
        ...     WorldModelEnv(world_model, real_env), real_env.rollout(200)
        ... )
        >>> 0 < metrics["base_rate"] < 1
        tensor(True)
    """
    recording = Recording.of(env, episodes, "termination_metrics")
    if not predicts_terminations(env):
        raise ValueError(
            f"The model predicts no terminations: its step writes "
            f"{written_keys(env.world_model.step_module)}. Give it a head, "
            f"WorldModel(..., done_head=...)."
        )
    rows = recording.transitions()
    # A head that samples decides by its threshold here.
    deterministic = set_interaction_type(InteractionType.DETERMINISTIC)
    with deterministic:
        imagined = imagine_particles(recording, rows.unsqueeze(1), 1)
    out = TensorDict({}, batch_size=[])
    for done_key in env.done_keys:
        names = as_tuple(done_key)
        if names[-1] != "done":
            continue
        prefix = names[:-1]
        key = sibling(done_key, "terminated")
        predicted = imagined.get(join("next", key)).reshape(-1).cpu()
        real = real_terminations(rows, done_key).reshape(-1).cpu()
        for name, value in _metrics(predicted, real).items():
            out.set(join(*prefix, name), value)
    return out


def predicts_terminations(env: WorldModelEnv) -> bool:
    """Return whether the model's step says when episodes end; the limit of a penalty does not."""
    written = written_keys(without_penalty(env.world_model).step_module)
    return any(as_tuple(key)[-1] in _ENDINGS for key in written)


def real_terminations(rows: TensorDictBase, done_key: NestedKey) -> torch.Tensor:
    """Return the recorded terminations, without time limits."""
    terminated, truncated, done = (
        rows.get(join("next", sibling(done_key, name)), None)
        for name in ("terminated", "truncated", "done")
    )
    if terminated is not None:
        return terminated
    if done is None:
        raise MissingEntryError(
            f"The episodes lack {join('next', sibling(done_key, 'terminated'))!r} and "
            f"{join('next', done_key)!r}, which say where they end; they have {leaf_keys(rows)}."
        )
    return done if truncated is None else done & ~truncated


def _metrics(predicted: torch.Tensor, real: torch.Tensor) -> dict[str, torch.Tensor]:
    counts = {
        "true_positives": (predicted & real).sum(),
        "false_positives": (predicted & ~real).sum(),
        "false_negatives": (~predicted & real).sum(),
        "true_negatives": (~predicted & ~real).sum(),
    }
    hits, false, missed, _ = counts.values()
    return {
        "precision": hits / (hits + false),
        "recall": hits / (hits + missed),
        "f1": 2 * hits / (2 * hits + false + missed),
        "base_rate": real.float().mean(),
        "predicted_rate": predicted.float().mean(),
        **counts,
    }
