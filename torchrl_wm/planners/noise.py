"""Noise that is correlated over time."""

from __future__ import annotations

import torch


def coloring(
    steps: int,
    beta: float,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Return the matrix that turns white noise over time into coloured noise.

    The covariance determines Gaussian noise. Noise with the power spectrum
    ``1 / f ** beta`` over a period of ``steps`` (and at frequency zero the power of
    the lowest other frequency) has a circulant one. Its square root, applied to white
    noise, does by one matrix product what Timmer and Koenig (1995) do by shaping the
    noise's Fourier transform. The variance is 1.

    Args:
        steps: the number of time steps ``H``.
        beta: the exponent; 0 gives white noise.
        dtype: the dtype of the matrix; torch's default if None.
        device: the device of the matrix.

    Returns:
        The matrix, ``[H, H]``.
    """
    frequency = torch.fft.fftfreq(steps, dtype=torch.float64).abs()
    frequency[0] = 1 / steps
    amplitude = frequency.pow(-beta / 2)
    # The amplitudes are the spectrum of the symmetric root of a circulant matrix.
    first = torch.fft.ifft(amplitude.to(torch.complex128)).real
    index = torch.arange(steps)
    root = first[(index.unsqueeze(0) - index.unsqueeze(1)) % steps]
    root = root / root.square().sum(1).sqrt()[:, None]
    return root.to(dtype=dtype or torch.get_default_dtype(), device=device)
