"""Dreamer's loss of the values of imagined states."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torchrl.objectives import DreamerV3ValueLoss

from torchrl_wm.modules.blocks.two_hot import neighbouring_bins, TwoHotHead
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import leaf_keys


class ImaginedValueLoss(DreamerV3ValueLoss):
    """TorchRL's :class:`~torchrl.objectives.DreamerV3ValueLoss` of two-hot values, in less time.

    The loss is the same (DreamerV3, arXiv 2301.04104, eq. 10 and the slow critic's regulariser).
    Both targets, the return and the value of the slow critic, are compared with the logits at
    once, each by the two bins next to it in place of a distribution over all, and the logits
    are not decoded to values that nobody reads.

    Args:
        value_model: the critic: a :class:`~tensordict.nn.TensorDictModule` of a
            :class:`~torchrl_wm.modules.TwoHotHead` over TorchRL's bins, as
            :func:`~torchrl_wm.models.make_dreamer_actor_critic` returns.
        settings: those of TorchRL's loss; ``value_loss`` is ``"two_hot"``, and ``reduction``
            ``"mean"``. The steps are weighed by ``"discount_weight"`` alone.

    Raises:
        TypeError: for another critic.
        ValueError: if it has another number of bins than the loss, or for another reduction.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm.models import make_dreamer_actor_critic, RSSMConfig
        >>> from torchrl_wm.objectives import ImaginedValueLoss
        >>> config = RSSMConfig(belief_size=8, categoricals=4, classes=4)
        >>> _, critic = make_dreamer_actor_critic(GymEnv("Pendulum-v1"), config)
        >>> loss = ImaginedValueLoss(critic, slow_critic_regularization=1.0)
        >>> imagined = TensorDict(
        ...     {
        ...         "state": torch.randn(5, 15, 16),
        ...         "belief": torch.randn(5, 15, 8),
        ...         "lambda_target": torch.randn(5, 15, 1),
        ...         "discount_weight": torch.ones(5, 15, 1),
        ...     },
        ...     [5, 15],
        ... )
        >>> terms, _ = loss(imagined)
        >>> terms["loss_value"].shape
        torch.Size([])
    """

    def __init__(self, value_model: TensorDictModule, **settings: Any) -> None:
        head = getattr(value_model, "module", value_model)
        if not isinstance(head, TwoHotHead):
            raise TypeError(
                f"ImaginedValueLoss needs a critic that is a TensorDictModule of a TwoHotHead, got "
                f"{type(value_model).__name__} of {type(head).__name__}. For other critics, use "
                f"torchrl.objectives.DreamerV3ValueLoss."
            )
        super().__init__(value_model, "two_hot", **settings)
        if head.two_hot.num_bins != len(self.value_bins):
            raise ValueError(
                f"The critic has {head.two_hot.num_bins} bins, and the loss {len(self.value_bins)}. "
                f"Give it as many: num_value_bins={head.two_hot.num_bins}."
            )
        if self.reduction != "mean":
            raise ValueError(
                f"ImaginedValueLoss returns means, got reduction={self.reduction!r}. For others, use "
                f"torchrl.objectives.DreamerV3ValueLoss."
            )

    def forward(
        self, fake_data: TensorDictBase
    ) -> tuple[TensorDictBase, TensorDictBase]:
        """Return ``"loss_value"`` and ``"value_slow_loss"``, scalars, and the imagined steps.

        Args:
            fake_data: imagined steps, ``[N, H]``, as TorchRL's ``DreamerV3ActorLoss`` returns
                them: what the critic reads, ``"lambda_target"`` and ``"discount_weight"``,
                ``[N, H, 1]`` each. The critic's logits, ``[N, H, bins]``, are taken from them
                where they are there with their graph, in place of another pass of the critic.

        Raises:
            KeyError: if one of these is missing.
        """
        key = self.tensor_keys.discount_weight
        reads = [*self.value_model.in_keys, "lambda_target", key]
        read = {name: fake_data.get(name, None) for name in reads}
        missing = [name for name, value in read.items() if value is None]
        if missing:
            raise MissingEntryError(
                f"ImaginedValueLoss reads {missing}, which the imagined steps lack; they have "
                f"{leaf_keys(fake_data)}. TorchRL's DreamerV3ActorLoss writes what it needs."
            )
        latents = [read[name] for name in self.value_model.in_keys]
        logits = fake_data.get(self.value_model.out_keys[0], None)
        if logits is None or not logits.requires_grad:
            with self.value_model_params.to_module(
                self.value_model, preserve_module_state=False
            ):
                logits = self.value_model.module.network(*latents)
        norm = logits.logsumexp(-1)
        weight = read[key].squeeze(-1)

        def distance(target: torch.Tensor) -> torch.Tensor:
            index, shares = neighbouring_bins(target.squeeze(-1), self.value_bins)
            return norm - (shares * logits.gather(-1, index)).sum(-1)

        loss = distance(read["lambda_target"])
        slow = torch.zeros_like(loss)
        if self.slow_critic_regularization:
            with torch.no_grad(), self.target_value_model_params.to_module(
                self.value_model, preserve_module_state=False
            ):
                _, slow_value = self.value_model.module(*latents)
            slow = distance(slow_value)
            loss = loss + self.slow_critic_regularization * slow
        terms = {
            "loss_value": (weight * loss).mean(),
            "value_slow_loss": (weight * slow).mean().detach(),
        }
        return TensorDict(terms), fake_data
