"""The blocks of TD-MPC2's latent (arXiv 2310.16828): normed MLPs and simplices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from torchrl_wm.modules.blocks.activations import group_softmax, Mish


class SimNorm(nn.Module):
    """A projection of a vector onto simplices: a softmax over each group of its elements.

    It norms the latent of TD-MPC2 (arXiv 2310.16828, section 3.1), which bounds the latent
    and its rollouts: all elements are in [0, 1], and each group sums to 1.

    Args:
        group: the number of elements in a group, which divides ``L``.
        temperature: that of the softmax; the smaller, the closer to one-hot.

    Raises:
        ValueError: if ``group`` or ``temperature`` is not positive.

    Examples:
        >>> import torch
        >>> from torchrl_wm.modules import SimNorm
        >>> latent = SimNorm(4)(torch.randn(5, 8))
        >>> latent.reshape(5, 2, 4).sum(-1).allclose(torch.ones(5, 2))
        True
    """

    def __init__(self, group: int = 8, temperature: float = 1.0) -> None:
        super().__init__()
        if group < 1 or not temperature > 0:
            raise ValueError(
                f"SimNorm needs a positive group and temperature, got group={group} and "
                f"temperature={temperature}."
            )
        self.group, self.temperature = group, temperature

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Norm a vector.

        Args:
            value: ``[*B, L]``.

        Returns:
            ``[*B, L]``, in [0, 1].

        Raises:
            ValueError: if the groups do not divide ``L``.
        """
        size = value.shape[-1]
        if size % self.group:
            raise ValueError(
                f"SimNorm has groups of {self.group}, which do not divide the {size} elements "
                f"of its input of shape {tuple(value.shape)}."
            )
        if self.temperature != 1:
            value = value / self.temperature
        return group_softmax(value, self.group)

    def extra_repr(self) -> str:
        return f"group={self.group}, temperature={self.temperature}"


class NormedLinear(nn.Sequential):
    """A linear layer, a layer norm and an activation (TD-MPC2, arXiv 2310.16828).

    Args:
        in_features: size of the input.
        out_features: size of the output.
        activation: makes the activation; Mish by default.
        dropout: the probability with which the linear layer's outputs are
            dropped in training.

    Examples:
        >>> import torch
        >>> from torchrl_wm.modules import NormedLinear
        >>> NormedLinear(3, 4)(torch.randn(5, 2, 3)).shape
        torch.Size([5, 2, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        activation: Callable[[], nn.Module] = Mish,
        dropout: float = 0.0,
    ) -> None:
        layers = [init_linear(nn.Linear(in_features, out_features))]
        if dropout:
            layers.append(nn.Dropout(dropout))
        super().__init__(*layers, nn.LayerNorm(out_features), activation())


class NormedMLP(nn.Sequential):
    """An MLP of :class:`NormedLinear` layers; several inputs are joined.

    Args:
        in_features: size of the inputs together.
        out_features: size of the output.
        num_cells: sizes of the hidden layers.
        activation: makes the activation after the last layer and a layer norm; by
            default the last layer is plainly linear.
        dropout: the probability of dropout after the first linear layer.

    Examples:
        >>> import torch
        >>> from torchrl_wm.modules import NormedMLP, SimNorm
        >>> dynamics = NormedMLP(8 + 2, 8, [32], activation=lambda: SimNorm(4))
        >>> dynamics(torch.randn(5, 8), torch.randn(5, 2)).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_cells: Sequence[int],
        *,
        activation: Callable[[], nn.Module] | None = None,
        dropout: float = 0.0,
    ) -> None:
        sizes = [in_features, *num_cells]
        layers: list[nn.Module] = [
            NormedLinear(before, after, dropout=0.0 if number else dropout)
            for number, (before, after) in enumerate(zip(sizes, sizes[1:]))
        ]
        if activation is None:
            layers.append(init_linear(nn.Linear(sizes[-1], out_features)))
        else:
            layers.append(NormedLinear(sizes[-1], out_features, activation=activation))
        super().__init__(*layers)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Map inputs ``[*B, n]``, joined, to ``[*B, out_features]``."""
        return super().forward(inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1))


def init_linear(layer: nn.Linear) -> nn.Linear:
    """Start a linear layer as TD-MPC2 does: small weights, no bias."""
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer
