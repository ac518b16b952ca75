"""When :meth:`WorldModelEnv.rollout <torchrl_wm.WorldModelEnv.rollout>` may take the fast path.

The fast path does in one go what the inherited loop does at every step, with the same result.
"""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase
from tensordict.nn.utils import skip_existing
from torchrl.envs import EnvBase

from torchrl_wm import _upstream
from torchrl_wm.envs.acting import Policy
from torchrl_wm.envs.imaginer import Imaginer
from torchrl_wm.modules.world_model.flat import FlatTensors

#: The methods whose built-in behaviour the fast path reproduces: an override of any disables it.
REPLACED_METHODS = (
    "_step",
    "_reset",
    *_upstream.STEP_METHODS,
    "reset",
    "maybe_reset",
    "any_done",
    "step",
    "step_mdp",
    "rand_action",
    "step_and_maybe_reset",
)


def why_slow(
    env: EnvBase,
    imaginer: Imaginer,
    policy: Policy,
    start: TensorDictBase | None,
    kept: FlatTensors | None,
    *,
    max_steps: int,
    auto_reset: bool,
    goes_on: bool,
    options: dict[str, Any],
) -> str | None:
    """Return why a rollout needs the inherited loop; None if the fast path gives the same.

    The ``options`` are the arguments that only the inherited loop heeds; ``kept`` are the entries
    of the start by flat key, None if they cannot be had.
    """
    if max_steps < 1 or (start is None and not auto_reset):
        return "the arguments are wrong, and the inherited rollout says how"
    layout = imaginer.layout
    endings = layout.endings
    given = [k for k, v in options.items() if v is not None and v is not False]
    if given:
        return f"the options {given} are given"
    if not policy.is_known:
        return f"the policy, {type(policy.given).__name__}, may do more than it says"
    if policy.reads_nested(layout, start):
        return "the policy reads whole nested tensordicts"
    unknown = _upstream.unknown_step(EnvBase)
    if unknown is not None:
        return f"TorchRL's envs have no {unknown}, which the fast path relies on"
    overridden = overridden_method(env)
    if overridden is not None:
        return f"{type(env).__name__} overrides {overridden}"
    if _upstream.has_step_hooks(env) or env.run_type_checks or skip_existing():
        return "hooks or type checks are set, or existing entries are to be skipped"
    if set(env.done_keys) != set(endings.keys):
        return "the done spec was changed"
    if endings.can_end and not endings.at_root:
        return "several groups of done entries can end"
    if endings.can_end and goes_on and imaginer.start_states is not None:
        return "finished rows begin anew"
    if kept is None:
        return "the start is no plain tensordict of tensors on the env's device"
    if auto_reset:
        return None
    if any(start.names) or any(key in kept for key in layout.reward_keys):
        return "the start has names or rewards of its own"
    if not all(key in kept for key in layout.carried):
        return "the start lacks entries that a reset gives"
    return None


def overridden_method(env: EnvBase) -> str | None:
    """Return the first of :data:`REPLACED_METHODS` that a subclass or the env overrides, or None."""
    kind = type(env)
    written = next(c for c in kind.__mro__ if c.__module__.startswith("torchrl_wm."))
    for name in REPLACED_METHODS:
        if name in env.__dict__ or (
            kind is not written and getattr(kind, name) is not getattr(written, name)
        ):
            return name
    return None
