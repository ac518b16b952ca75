"""The collectors of runs by the setting that names them."""

from __future__ import annotations

import torch
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase

from torchrl_wm.trainers.collecting import RealSteps
from torchrl_wm.trainers.counted_steps import CountedSteps
from torchrl_wm.trainers.ray_collecting import RaySteps
from torchrl_wm.trainers.real_envs import EnvSource
from torchrl_wm.trainers.settings import RunConfig


def real_steps(
    config: RunConfig,
    source: EnvSource,
    env: EnvBase,
    policy: TensorDictModuleBase,
    device: torch.device,
) -> CountedSteps:
    """Return the collector that a config names.

    Args:
        config: says how many envs there are, and where they run.
        source: makes the envs.
        env: one of them.
        policy: the policy.
        device: the device of the policy.
    """
    kind = RaySteps if config.collector == "ray" else RealSteps
    return kind(config, source, env, policy, device)
