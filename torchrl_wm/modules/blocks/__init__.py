"""The blocks that a world model can be made of.

- ``entries.py``: ``Entry``; the entries of an env as one float vector, and back.
- ``normalizer.py``: inputs and targets in units of the data; ``precision.py`` warns of data that
  single precision cannot hold.
- ``heads.py``: terminations, Gaussians, and functions that the user knows.
- ``gaussian.py``: bounds of log-variances.
- ``ensemble.py``: several networks as one; ``ensemble_dynamics.py``: PETS's and MBPO's dynamics;
  ``propagation.py``: one ensemble, propagated in several ways; ``penalty.py``: rewards that pay
  for what a model does not know, by the heads of ``penalty_heads.py``;
  ``data_limit.py``: how much it may doubt.
- ``rssm.py``: TorchRL's RSSM networks; ``pixels.py``: its image networks.
- ``attention.py``: a causal transformer, in one pass or step by step.
- ``diffusion.py``: EDM's denoiser and sampler; ``diffusion_networks.py``: networks of denoisers;
  ``diffusion_dynamics.py``: DIAMOND's dynamics, which remember frames; ``transition_lstm.py``: its
  judge of rewards and ends.
- ``latent.py``: TD-MPC2's latents; ``q_ensemble.py``: its action values; ``two_hot.py``: scalars
  as distributions over bins.
"""

from __future__ import annotations
