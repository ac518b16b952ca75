"""Noise that is coloured over time."""

from __future__ import annotations

import torch


def coloring(
    steps: int,
    beta: float,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """The matrix that turns white noise over time into coloured noise.

    Gaussian noise is known by its covariance. That of noise with the power
    spectrum ``1 / f ** beta`` over a period of ``steps`` (with the power at zero
    frequency that of the lowest other one) is circulant; a square root of it,
    applied to white noise, gives what shaping the noise's Fourier transform
    gives (Timmer and Koenig, 1995), by one matrix product. The variance is 1.

    Args:
        steps: the number of time steps ``H``.
        beta: the exponent; 0 is white.
        dtype: of the matrix.
        device: of the matrix.

    Returns:
        ``[H, H]``.
    """
    frequency = torch.fft.fftfreq(steps, dtype=torch.float64).abs()
    frequency[0] = 1 / steps
    amplitude = frequency.pow(-beta / 2)
    # The symmetric root of a circulant matrix has the amplitudes as its spectrum.
    first = torch.fft.ifft(amplitude.to(torch.complex128)).real
    index = torch.arange(steps)
    root = first[(index.unsqueeze(0) - index.unsqueeze(1)) % steps]
    root = root / root.square().sum(1).sqrt()[:, None]
    return root.to(dtype=dtype or torch.get_default_dtype(), device=device)
