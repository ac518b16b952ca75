"""The term that trains a diffusion world model: denoising real next frames."""

from __future__ import annotations

from tensordict import NestedKey

from torchrl_wm.modules import DiffusionDynamics, WorldModel
from torchrl_wm.modules.world_model.wiring import written_keys
from torchrl_wm.objectives.comparisons import next_observations
from torchrl_wm.objectives.keys import LossKeys
from torchrl_wm.objectives.samples import pieces
from torchrl_wm.objectives.terms import LossTerm


class DenoisingTerm(LossTerm):
    """EDM's weighted denoising loss of real next frames, given the real frames before them.

    Every step of sequences ``[*B, T]`` has a next frame, and as many frames of context as its
    sequence has before it, up to ``context``; where there are fewer, the context is padded as at
    the beginning of an episode. It never goes beyond that beginning, nor through steps that the
    mask calls invalid. Noise levels are drawn for each frame. Nothing is predicted: the sampler
    does not run (arXiv 2206.00364, eq. 8; 2405.12399, eq. 6).

    Args:
        weight: the factor of the term.
        name: the loss appears as ``loss_<name>``.

    Examples:
        >>> import torch
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm import WorldModelLoss
        >>> from torchrl_wm.models import make_diffusion_world_model
        >>> from torchrl_wm.modules import fit_normalizers
        >>> from torchrl_wm.objectives import DenoisingTerm
        >>> env = GymEnv("CartPole-v1")
        >>> world_model, _ = make_diffusion_world_model(env, hidden=(32,))
        >>> batch = env.rollout(20, break_when_any_done=False)
        >>> fit_normalizers(world_model, batch)
        >>> loss = WorldModelLoss(world_model, losses=[DenoisingTerm()], reduction="none")
        >>> loss(batch)["loss_denoising"].shape
        torch.Size([20])
    """

    needs_prediction = False

    def __init__(self, weight: float = 1.0, name: str = "denoising") -> None:
        super().__init__(name, weight)

    def check(self, world_model: WorldModel) -> None:
        super().check(world_model)
        dynamics = world_model.dynamics
        if not isinstance(dynamics, DiffusionDynamics):
            raise ValueError(
                f"The loss {self.name!r} trains dynamics that draw frames, and the world model has "
                f"{type(dynamics).__name__}. Pass WorldModel(encoder, DiffusionDynamics(...), ...)."
            )
        encoded = written_keys(world_model.encoder)
        if dynamics.frame_key not in encoded:
            raise ValueError(
                f"The loss {self.name!r} denoises the latent {dynamics.frame_key!r} of real "
                f"observations, and the encoder writes {encoded}. Let it write the frame."
            )

    def labels(self, world_model: WorldModel, keys: LossKeys) -> list[NestedKey]:
        return [*world_model.dynamics.action_keys, *next_observations(world_model)]

    def __call__(self, predicted, batch, loss):
        if getattr(loss, "multi_step", False):
            raise ValueError(
                f"The loss {self.name!r} denoises given real frames, and with multi_step=True the "
                f"model rolls its own. Leave out multi_step: each step of a sequence counts anyway."
            )
        dynamics = loss.world_model.dynamics
        following = loss.encode_next(batch).get(dynamics.frame_key)
        actions = [batch.get(key) for key in dynamics.action_keys]
        parts = None
        if dynamics.memory:
            parts = pieces(batch, loss.tensor_keys, loss.valid(batch))
        frames = predicted.get(dynamics.frame_key)
        return dynamics.denoising_loss(frames, actions, following, parts)
