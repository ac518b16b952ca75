"""The keys of the world model loss, and where they find labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDictBase

from torchrl_wm.modules.keys import join


@dataclass
class LossKeys:
    """The keys that :meth:`WorldModelLoss.set_keys` can change. ``[*B]`` is the batch.

    ``reward``, ``done`` and ``terminated`` stand below "next", both in the batch (labels)
    and in the predictions. Labels that the batch has under another name are given by
    ``true_reward``, ``true_done`` and ``true_terminated``.

    Attributes:
        reward: the reward. Default ``"reward"``.
        true_reward: its label, if the batch has that; else ``reward``.
        done: the end of the episode. Default ``"done"``.
        true_done: its label, if the batch has that; else ``done``.
        terminated: the termination; logits are looked for beside it. Default
            ``"terminated"``.
        true_terminated: its label, if the batch has that; else ``terminated``.
        observation: the observation that is reconstructed.
        reconstructed_observation: the decoder's entry for it.
        predicted_latent: the prediction that ``target_latent`` is compared with.
        target_latent: a latent target given in the batch.
        mask: ``[*B]`` or ``[*B, 1]`` bool, True where a sample is valid.
        weight: ``[*B]`` or ``[*B, 1]`` weights of the samples.
        priority_weight: as ``weight``; prioritised replay writes it.
    """

    reward: NestedKey = "reward"
    true_reward: NestedKey = "true_reward"
    done: NestedKey = "done"
    true_done: NestedKey = "true_done"
    terminated: NestedKey = "terminated"
    true_terminated: NestedKey = "true_terminated"
    observation: NestedKey = "observation"
    reconstructed_observation: NestedKey = "reconstructed_observation"
    predicted_latent: NestedKey = "predicted_latent"
    target_latent: NestedKey = "target_latent"
    mask: NestedKey = ("collector", "mask")
    weight: NestedKey = "weight"
    priority_weight: NestedKey = "priority_weight"

    def label_key(self, name: str) -> NestedKey:
        """Return where the label ``name`` stands in the batch: ``true_<name>`` if that was set."""
        own = getattr(self, f"true_{name}")
        return join("next", getattr(self, name) if own == f"true_{name}" else own)

    def find_label(self, batch: TensorDictBase, name: str) -> torch.Tensor | None:
        """Return the label under ``true_<name>`` or ``<name>``; None if the batch has neither."""
        value = batch.get(join("next", getattr(self, f"true_{name}")), None)
        if value is None:
            value = batch.get(join("next", getattr(self, name)), None)
        return value
