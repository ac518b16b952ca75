"""An imagined env that also shows how much the members of its ensemble disagree."""

from __future__ import annotations

from tensordict import NestedKey
from torchrl.data import Composite, Unbounded

from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules.blocks.ensemble_dynamics import DISAGREEMENT
from torchrl_wm.modules.keys import as_tuple, strip_next, unique


def disagreement_keys(env: WorldModelEnv) -> list[NestedKey]:
    """Return the entries of an imagined env that show a disagreement."""
    keys = unique(env.observation_spec.keys(True, True))
    return [key for key in keys if as_tuple(key)[-1] == DISAGREEMENT]


def with_disagreement(env: WorldModelEnv) -> WorldModelEnv:
    """Return an imagined env that carries the disagreement that its model's dynamics writes.

    It is the same env if the dynamics writes none, the env has it already, or it is of a subclass.

    Args:
        env: an imagined env of batch size ``[]``.
    """
    written = unique(env.world_model.dynamics.out_keys)
    found = [strip_next(key) for key in written if as_tuple(key)[-1] == DISAGREEMENT]
    if not found or disagreement_keys(env) or type(env) is not WorldModelEnv:
        return env
    spec = Composite(shape=(), device=env.device)
    for key in found:
        spec[key] = Unbounded((1,), device=env.device)
    return WorldModelEnv(
        env.world_model,
        env,  # the same specs
        observation_spec=spec,
        batch_size=[],
        start_states=env.start_states,
        max_steps=env.max_steps,
        decode=env.imaginer.decode,
    )
