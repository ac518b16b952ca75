"""Heads of ready-made models, wired to the entries of an env."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from tensordict import NestedKey
from tensordict.nn import TensorDictModule
from torch import nn

from torchrl_wm.models.env_specs import EnvSpecs
from torchrl_wm.modules import TerminationHead, TwoHotHead
from torchrl_wm.modules.keys import join, suffixed

H = TypeVar("H", bound=TerminationHead)


def end_head(
    kind: type[H],
    network: nn.Module,
    reads: Sequence[NestedKey],
    specs: EnvSpecs,
    config: Any,
) -> H:
    """Return a head of ``kind`` that predicts the env's done entry.

    Args:
        kind: the class of the head.
        network: the network of the logits, with ``specs.done.size`` outputs.
        reads: the entries that the network reads.
        specs: the entries of the env.
        config: the settings; ``termination_threshold`` and ``sample_termination`` are used.
    """
    return kind(
        network,
        reads,
        done_key=specs.done.key,
        shape=specs.done.shape,
        threshold=config.termination_threshold,
        sample=config.sample_termination,
    )


def two_hot_reward_head(
    network: nn.Module, bins: nn.Module, reads: Sequence[NestedKey], specs: EnvSpecs
) -> TensorDictModule:
    """Return a head that predicts the env's reward as a distribution over bins.

    Args:
        network: the network of the logits, with an output for each bin of each reward.
        bins: the two-hot coding of rewards.
        reads: the entries that the network reads.
        specs: the entries of the env.
    """
    reward = specs.reward
    logits = suffixed(reward.key, "_logits")
    return TensorDictModule(
        TwoHotHead(network, bins, shape=reward.shape, dtype=reward.dtype),
        reads,
        [join("next", logits), join("next", reward.key)],
    )
