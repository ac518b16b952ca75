"""Diffusion as in EDM: noise levels, preconditioning, a denoiser, and how it is sampled.

``x`` is what is drawn, ``[*B, *S]``, and ``sigma``, ``[*B]``, the standard deviation of the noise
on it. Equations are those of EDM (arXiv 2206.00364), settings those of DIAMOND (arXiv 2405.12399).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import nn

#: Maps noisy ``x``, ``[*B, *S]``, and ``sigma``, ``[*B]``, to what is left without the noise.
Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_SAMPLERS = ("euler", "heun")


class Scales(NamedTuple):
    """The factors around the network of a denoiser at one noise level (EDM, table 1).

    The denoiser is ``skip * x + out * network(inner * x, noise)``.

    Args:
        inner: ``c_in``, which gives the network's input unit variance.
        skip: ``c_skip``, the share of the noisy ``x`` itself.
        out: ``c_out``, which gives the network's target unit variance.
        noise: ``c_noise``, by which the network knows the noise level.
    """

    inner: torch.Tensor
    skip: torch.Tensor
    out: torch.Tensor
    noise: torch.Tensor


def preconditioning(sigma: torch.Tensor, sigma_data: float) -> Scales:
    """Return the factors around a denoiser's network (EDM, arXiv 2206.00364, table 1).

    Args:
        sigma: the noise level, any shape, above 0.
        sigma_data: the standard deviation of the data.

    Examples:
        >>> import torch
        >>> from torchrl_wm.modules import preconditioning
        >>> scales = preconditioning(torch.tensor([0.5, 50.0]), sigma_data=0.5)
        >>> scales.skip  # little noise: x itself; much noise: what the network says
        tensor([5.0000e-01, 9.9990e-05])
    """
    variance = sigma.square() + sigma_data**2
    return Scales(
        variance.rsqrt(),
        sigma_data**2 / variance,
        sigma * sigma_data * variance.rsqrt(),
        sigma.log() / 4,
    )


def draw_sigma(
    like: torch.Tensor,
    mean: float = -0.4,
    std: float = 1.2,
    low: float = 2e-3,
    high: float = 20.0,
) -> torch.Tensor:
    """Return noise levels for training, whose logarithms are Gaussian (EDM, section 5).

    Args:
        like: their shape, dtype and device.
        mean, std: those of the logarithm.
        low, high: the least and the greatest noise level.

    Examples:
        >>> import torch
        >>> from torchrl_wm.modules import draw_sigma
        >>> draw_sigma(torch.empty(2, 3)).shape
        torch.Size([2, 3])
    """
    return (mean + std * torch.randn_like(like)).exp().clamp(low, high)


def karras_sigmas(
    steps: int, low: float = 2e-3, high: float = 5.0, rho: float = 7.0
) -> torch.Tensor:
    """Return the noise levels that a sampler goes through, the last one 0 (EDM, eq. 5).

    Args:
        steps: the number of steps ``n``.
        low, high: the least noise level above 0, and the first one.
        rho: the greater, the more of the steps are at low noise.

    Returns:
        ``[n + 1]``, falling.

    Raises:
        ValueError: if there is no step, or the levels do not rise from ``low`` to ``high``.

    Examples:
        >>> from torchrl_wm.modules import karras_sigmas
        >>> karras_sigmas(3)
        tensor([5.0000e+00, 2.8308e-01, 2.0000e-03, 0.0000e+00])
    """
    if steps < 1:
        raise ValueError(
            f"A sampler makes at least one step, got steps={steps}. DIAMOND makes 3."
        )
    if not 0 < low < high:
        raise ValueError(
            f"The noise levels fall from high to low, both above 0; got low={low}, high={high}."
        )
    ramp = torch.linspace(0, 1, steps)
    ends = high ** (1 / rho), low ** (1 / rho)
    levels = (ends[0] + ramp * (ends[1] - ends[0])) ** rho
    levels[0] = high
    return torch.cat([levels, torch.zeros(1)])


class DiffusionSampler(nn.Module):
    """A sampler: from noise to data by a few steps of an ordinary differential equation.

    EDM's algorithm 1 (arXiv 2206.00364), without churn: with ``"euler"`` the denoiser runs once a
    step, with ``"heun"``, of second order, twice but in the last one. Noise is drawn unless an
    ``set_interaction_type`` asks for a mode, a mean or a median: then the sampler begins at the
    middle of the noise, which is zero.

    Args:
        steps: the number of steps; 3 in DIAMOND.
        method: ``"euler"`` or ``"heun"``.
        low, high, rho: see :func:`karras_sigmas`.

    Raises:
        ValueError: if the method is unknown, or as :func:`karras_sigmas`.

    Examples:
        >>> import torch
        >>> from torchrl_wm.modules import DiffusionSampler
        >>> sampler = DiffusionSampler(steps=10)
        >>> def denoise(x, sigma):  # of data that are all 2
        ...     return torch.full_like(x, 2.0)
        >>> sampler(denoise, torch.empty(3, 1)).flatten()
        tensor([2., 2., 2.])
    """

    def __init__(
        self,
        steps: int = 3,
        method: Literal["euler", "heun"] = "euler",
        *,
        low: float = 2e-3,
        high: float = 5.0,
        rho: float = 7.0,
    ) -> None:
        super().__init__()
        if method not in _SAMPLERS:
            raise ValueError(
                f"Unknown method={method!r}. Valid choices are {list(_SAMPLERS)}."
            )
        self.steps, self.method = steps, method
        # Derived from the settings, so not part of the state.
        self.register_buffer(
            "sigmas", karras_sigmas(steps, low, high, rho), persistent=False
        )

    def forward(
        self, denoise: Denoise, like: torch.Tensor, dims: int = 1, noisy: bool = True
    ) -> torch.Tensor:
        """Draw samples.

        Args:
            denoise: the denoiser.
            like: has the shape ``[*B, *S]``, the dtype and the device of the samples.
            dims: the number of dims of ``*S``.
            noisy: whether to begin with noise; else with zeros.
        """
        sigmas = self.sigmas.to(like.dtype)
        lead = like.shape[: like.ndim - dims]
        x = torch.zeros_like(like)
        if noisy:
            x = sigmas[0] * torch.randn_like(like)
        for step in range(self.steps):
            here, there = sigmas[step], sigmas[step + 1]
            clean = denoise(x, here.expand(lead))
            if (
                step == self.steps - 1
            ):  # the step to noise 0 leads to the denoised x itself
                return clean
            slope = (x - clean) / here
            moved = x + (there - here) * slope
            if self.method == "heun":
                further = (moved - denoise(moved, there.expand(lead))) / there
                moved = x + (there - here) * (slope + further) / 2
            x = moved
        return x

    def extra_repr(self) -> str:
        return f"steps={self.steps}, method={self.method!r}"


class Denoiser(nn.Module):
    """A network between EDM's factors: what is left of noisy ``x`` without the noise.

    Args:
        network: ``network(x, noise, *context)`` maps scaled noisy ``x``, ``[N, *S]``, and
            ``noise``, ``[N]``, to ``[N, *S]``. ``context`` is what it is conditioned on.
        dims: the number of dims of ``*S``.

    Keyword Args:
        sigma_data: the standard deviation of the data.
        offset_noise: the standard deviation of noise that all numbers of a channel share, in
            training: with DIAMOND's 0.3 for images, the overall brightness is learned, too.

    Examples:
        >>> import torch
        >>> from torchrl_wm.modules import Denoiser
        >>> denoiser = Denoiser(lambda x, noise, context: context - x)
        >>> x, sigma, context = torch.randn(5, 2, 3), torch.rand(5, 2), torch.randn(5, 2, 3)
        >>> denoiser(x, sigma, context).shape
        torch.Size([5, 2, 3])
        >>> denoiser.loss(x, context).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        network: nn.Module | Callable[..., torch.Tensor],
        dims: int = 1,
        *,
        sigma_data: float = 0.5,
        offset_noise: float = 0.0,
    ) -> None:
        super().__init__()
        if sigma_data <= 0 or offset_noise < 0:
            raise ValueError(
                f"sigma_data must be above 0 and offset_noise at least 0, got {sigma_data} and "
                f"{offset_noise}."
            )
        self.network, self.dims = network, dims
        self.sigma_data, self.offset_noise = sigma_data, offset_noise

    def forward(
        self, x: torch.Tensor, sigma: torch.Tensor, *context: torch.Tensor
    ) -> torch.Tensor:
        """Denoise.

        Args:
            x: noisy, ``[*B, *S]``.
            sigma: its noise level, ``[*B]``.
            context: what the network is conditioned on, ``[*B, ...]`` each.

        Returns:
            ``[*B, *S]``, the estimate of what is left without noise.
        """
        scales, predicted = self._predict(x, sigma, context)
        return scales.skip * x + scales.out * predicted

    def loss(self, clean: torch.Tensor, *context: torch.Tensor) -> torch.Tensor:
        """Return EDM's weighted loss at random noise levels, ``[*B]`` (eq. 8, table 1).

        The weight is ``1 / c_out ** 2``, so that each noise level counts alike: it is the
        squared error of the network on ``(clean - c_skip * noisy) / c_out``.

        Args:
            clean: the data, ``[*B, *S]``.
            context: what the network is conditioned on, ``[*B, ...]`` each.
        """
        lead = clean.shape[: clean.ndim - self.dims]
        sigma = draw_sigma(clean.new_empty(lead))
        noise = self._per_x(sigma) * torch.randn_like(clean)
        if self.offset_noise:  # one number for each channel
            channel = clean.new_empty(*lead, clean.shape[len(lead)])
            shared = self.offset_noise * torch.randn_like(channel)
            noise = noise + shared.reshape(*channel.shape, *(1,) * (self.dims - 1))
        noisy = clean + noise
        scales, predicted = self._predict(noisy, sigma, context)
        target = (clean - scales.skip * noisy) / scales.out
        error = (predicted - target).square()
        return error.flatten(len(lead)).mean(-1)

    def _predict(
        self, x: torch.Tensor, sigma: torch.Tensor, context: tuple[torch.Tensor, ...]
    ) -> tuple[Scales, torch.Tensor]:
        """Return the factors, shaped for ``x``, and what the network makes of it."""
        lead = x.shape[: x.ndim - self.dims]
        # Beside the noise of each number there may be that of its channel.
        level = (sigma.square() + self.offset_noise**2).sqrt()
        scales = preconditioning(level, self.sigma_data)
        inner, skip, out = map(self._per_x, scales[:3])
        rows = (inner * x, scales.noise, *context)
        if len(lead) != 1:
            rows = tuple(row.reshape(-1, *row.shape[len(lead) :]) for row in rows)
        predicted = self.network(*rows).reshape(x.shape)
        return Scales(inner, skip, out, scales.noise), predicted

    def _per_x(self, value: torch.Tensor) -> torch.Tensor:
        return value.reshape(*value.shape, *(1,) * self.dims)

    def extra_repr(self) -> str:
        offset = f", offset_noise={self.offset_noise}" if self.offset_noise else ""
        return f"sigma_data={self.sigma_data}{offset}"
