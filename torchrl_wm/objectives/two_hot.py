"""The term that trains two-hot heads."""

from __future__ import annotations

import torch
from tensordict import NestedKey
from torch import nn

from torchrl_wm.modules import TwoHotHead, WorldModel
from torchrl_wm.modules.keys import join, suffixed
from torchrl_wm.modules.world_model.wiring import written_keys
from torchrl_wm.objectives.comparisons import per_sample, prediction, reward_label
from torchrl_wm.objectives.keys import LossKeys
from torchrl_wm.objectives.terms import LossTerm


class TwoHotTerm(LossTerm):
    """Cross-entropy of a two-hot reward head's logits, in nats.

    The label, a scalar, is spread over two neighbouring bins (DreamerV3, arXiv
    2301.04104, eq. 10; TD-MPC2, arXiv 2310.16828, eq. 3). The logits stand beside
    the reward, as :class:`~torchrl_wm.modules.TwoHotHead` writes them.

    Args:
        weight: the factor of the term.
        key: the reward, below "next"; by default the loss's ``reward`` key.
        logits_key: its logits, below "next"; by default ``<reward>_logits``
            beside it.
        two_hot: the bins, an object with ``loss(logits, target)``; by default
            the reward head's.
        name: the loss appears as ``loss_<name>``.
    """

    components = ("reward_head",)

    def __init__(
        self,
        weight: float = 1.0,
        *,
        key: NestedKey | None = None,
        logits_key: NestedKey | None = None,
        two_hot: nn.Module | None = None,
        name: str = "reward",
    ) -> None:
        super().__init__(name, weight)
        self.key, self.logits_key, self.two_hot = key, logits_key, two_hot

    def check(self, world_model: WorldModel) -> None:
        super().check(world_model)
        if self.two_hot is None:
            self._bins(world_model)

    def labels(self, world_model: WorldModel, keys: LossKeys) -> list[NestedKey]:
        return [keys.label_key("reward") if not self.key else join("next", self.key)]

    def __call__(self, predicted, batch, loss) -> torch.Tensor:
        keys = loss.tensor_keys
        name = self.key or keys.reward
        logits_key = join("next", self.logits_key or suffixed(name, "_logits"))
        logits = prediction(predicted, logits_key, "reward_head", loss.world_model)
        label = reward_label(batch, keys, self.name, self.key)
        scalar = logits.shape[:-1]
        if label.shape not in (scalar, (*scalar, 1)):
            raise ValueError(
                f"The logits {logits_key!r} have the shape {tuple(logits.shape)}, bins last, and "
                f"their label {join('next', name)!r} {tuple(label.shape)}; {tuple(scalar)} or "
                f"{(*scalar, 1)} is expected."
            )
        two_hot = self.two_hot or self._bins(loss.world_model)
        bins = two_hot.bins.to(logits.device)
        if logits.shape[-1] != bins.numel():
            raise ValueError(
                f"The logits {logits_key!r} have {logits.shape[-1]} bins, and the two-hot "
                f"encoding {bins.numel()}. Give the term that of the head: "
                f"TwoHotTerm(two_hot=...)."
            )
        return per_sample(two_hot.loss(logits, label.to(logits.dtype)), batch)

    def _bins(self, world_model: WorldModel) -> nn.Module:
        """Return the bins of the reward head."""
        head = world_model.reward_head
        for module in head.modules():
            if isinstance(module, TwoHotHead):
                return module.two_hot
        raise ValueError(
            f"The loss {self.name!r} trains a two-hot reward head, and reward_head "
            f"({type(head).__name__} that writes {written_keys(head)}) has no TwoHotHead. Make "
            f"it one, TensorDictModule(TwoHotHead(network), [...], [('next', 'reward_logits'), "
            f"('next', 'reward')]), or pass the bins: TwoHotTerm(two_hot=SymExpTwoHot())."
        )
