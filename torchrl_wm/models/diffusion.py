"""Diffusion world models, as DIAMOND, from an env's specs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import nn
from torchrl.envs import EnvBase
from torchrl.modules import MLP

from torchrl_wm._checks import check_choice
from torchrl_wm.models.building import build, register
from torchrl_wm.models.env_specs import EnvSpecs
from torchrl_wm.models.frames import (
    frame_shape,
    FrameImages,
    FrameVectors,
    ImageFrames,
    VectorFrames,
)
from torchrl_wm.models.heads import end_head
from torchrl_wm.models.networks import UnitActions
from torchrl_wm.modules import (
    Denoiser,
    DenoiserMLP,
    DenoiserUNet,
    DenormalizedNetwork,
    DiffusionDynamics,
    DiffusionSampler,
    FrameModel,
    ImageFeatures,
    Normalizer,
    TerminationHead,
    TransitionLSTM,
    WorldModel,
)
from torchrl_wm.modules.keys import join
from torchrl_wm.objectives import (
    DenoisingTerm,
    DoneTerm,
    LossTerm,
    RewardTerm,
    WorldModelLoss,
)

_FRAME, _FRAMES, _ACTIONS = "frame", "past_frames", "past_actions"
_HIDDEN, _CELL = _STATE = ("judge_hidden", "judge_cell")


@dataclass(frozen=True)
class DiffusionConfig:
    """The settings of :func:`make_diffusion_world_model`.

    The defaults are a model of a size that learns small problems on a CPU; :meth:`diamond` has the
    paper's sizes.

    Args:
        observation_keys: the observations to model; all by default.
        context: ``K``, the number of frames of which the next one is drawn.
        sampling_steps: the number of denoising steps of a drawn frame.
        sampler: ``"euler"``, or ``"heun"``, which runs the network almost twice as often.
        sigma_min, sigma_max: the noise levels between which it is drawn.
        hidden: the sizes of the hidden layers of the networks of vectors and of memoryless heads.
        noise_features: the length of the noise level's embedding, for vectors; even.
        channels, depths, attention: the stages of the U-Net of images; see
            :class:`~torchrl_wm.modules.DenoiserUNet`.
        condition_features: the length of what conditions it; even.
        offset_noise: see :class:`~torchrl_wm.modules.Denoiser`; for images.
        head_memory: whether reward and termination are judged by an LSTM over all transitions
            up to now, or by a single one; by default the LSTM for images only.
        lstm_size: the size of the LSTM.
        head_channels, head_depths: the stages of the convolutions before it.
        termination: ``"learned"``, or ``"none"`` if only a time limit ends episodes.
        termination_threshold: the probability above which an episode ends.
        sample_termination: draw terminations from their probability instead.
        denoising_weight, reward_weight, done_weight: the weights of the losses.

    Raises:
        ValueError: if ``context`` or ``sampling_steps`` is below 1.
    """

    observation_keys: tuple[NestedKey, ...] | None = None
    context: int = 4
    sampling_steps: int = 3
    sampler: Literal["euler", "heun"] = "euler"
    sigma_min: float = 2e-3
    sigma_max: float = 5.0
    hidden: tuple[int, ...] = (256, 256)
    noise_features: int = 32
    channels: tuple[int, ...] = (16, 32, 32)
    depths: tuple[int, ...] = (1, 1, 1)
    attention: tuple[bool, ...] | None = None
    condition_features: int = 64
    offset_noise: float = 0.3
    head_memory: bool | None = None
    lstm_size: int = 64
    head_channels: tuple[int, ...] = (16, 32, 32)
    head_depths: tuple[int, ...] = (1, 1, 1)
    termination: Literal["learned", "none"] = "learned"
    termination_threshold: float = 0.5
    sample_termination: bool = False
    denoising_weight: float = 1.0
    reward_weight: float = 1.0
    done_weight: float = 1.0

    def __post_init__(self) -> None:
        for name, what in (
            (
                "context",
                "the number of frames of which the next one is drawn; DIAMOND has 4",
            ),
            (
                "sampling_steps",
                "the number of denoising steps of a frame; DIAMOND has 3",
            ),
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}: it is {what}."
                )
        check_choice("sampler", self.sampler, ("euler", "heun"))
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"The noise levels of a sampler lie between sigma_min and sigma_max, and it must be "
                f"0 < sigma_min < sigma_max, got sigma_min={self.sigma_min} and "
                f"sigma_max={self.sigma_max}."
            )

    @classmethod
    def diamond(cls, **settings: Any) -> DiffusionConfig:
        """Return the sizes of DIAMOND (arXiv 2405.12399), for images of 64 x 64."""
        paper = {
            "channels": (64,) * 4,
            "depths": (2,) * 4,
            "condition_features": 256,
            "lstm_size": 512,
            "head_channels": (32,) * 4,
            "head_depths": (2,) * 4,
        }
        return cls(**{**paper, **settings})


def make_diffusion_world_model(
    env: EnvBase, config: DiffusionConfig | None = None, **overrides: Any
) -> tuple[WorldModel, WorldModelLoss]:
    """Make a world model of ``env`` that draws the next frame by a diffusion model (DIAMOND).

    The latent is the newest frame, ``"frame"``: the vector observations in units of their
    spread, ``[*B, n]``, or the images as channels of one, between -1 and 1, ``[*B, C, H, W]``. The
    frames before it and their actions, and the state of the heads' LSTM, are memory: carried from
    step to step, recorded nowhere. A start without memory is a single frame whose past is not
    known; :meth:`~torchrl_wm.WorldModel.burn_in` makes a start of recorded steps.

    The loss takes sequences, ``[*B, T]``, with or without ``is_init``: each next frame is
    denoised given the ``context`` real ones before it, never beyond the beginning of an episode
    (arXiv 2405.12399, eq. 4 to 6); heads learn from real frames. It draws no frames. Fit the
    normalisers before training::

        fit_normalizers(world_model, batch)

    Imagined frames are drawn. Under ``set_interaction_type("deterministic")`` (or mode, mean) they
    begin from no noise, and are the same each time.

    Args:
        env: the env whose specs are read. Vector observations or images, continuous, discrete
            and multi-dimensional actions.
        config, overrides: the settings, as a whole and by name.

    Returns:
        The model and its loss.

    Raises:
        TypeError: for an unknown setting.
        ValueError: for observations that are not served: class numbers, vectors beside images, or
            images of several sizes; the message names them.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm import WorldModelEnv
        >>> from torchrl_wm.models import make_diffusion_world_model
        >>> from torchrl_wm.modules import fit_normalizers
        >>> real_env = GymEnv("CartPole-v1")
        >>> world_model, loss = make_diffusion_world_model(real_env, hidden=(32,))
        >>> world_model.latent_keys, world_model.memory_keys
        (['frame'], ['past_frames', 'past_actions'])
        >>> batch = real_env.rollout(100, break_when_any_done=False)
        >>> fit_normalizers(world_model, batch)
        >>> sorted(loss(batch).keys())
        ['loss_denoising', 'loss_done', 'loss_reward']
        >>> env = WorldModelEnv(world_model, real_env, start_states=real_env, decode=True)
        >>> env.imagine(5)["next", "observation"].shape
        torch.Size([5, 4])
    """
    return build("diffusion", env, config, overrides)


@register(
    "diffusion",
    DiffusionConfig,
    reserved=(_FRAME, _FRAMES, _ACTIONS, _HIDDEN, _CELL),
)
def _wire(
    specs: EnvSpecs, config: DiffusionConfig
) -> tuple[WorldModel, WorldModelLoss]:
    shape = frame_shape(specs, "make_diffusion_world_model")
    check_choice("termination", config.termination, ("learned", "none"))
    dynamics = _dynamics(specs, config, shape)
    remembers = config.head_memory
    remembers = bool(specs.pixels) if remembers is None else remembers
    reward_head, done_head, reward = _heads(specs, config, shape, remembers)
    memory, begin = list(dynamics.memory), TensorDict({})
    if memory:
        begin.update(dynamics.initial_memory)
    if remembers:
        memory += _STATE
        for key in _STATE:
            begin.set(key, torch.zeros(config.lstm_size))
    if specs.pixels:
        frames, images = ImageFrames(specs.pixels), FrameImages(specs.pixels)
    else:
        frames, images = VectorFrames(specs), FrameVectors(specs)
    world_model = WorldModel(
        TensorDictModule(frames, specs.observation_keys, [_FRAME]),
        dynamics,
        reward_head,
        done_head=done_head,
        decoder=TensorDictModule(images, [_FRAME], specs.observation_keys),
        memory=memory,
        initial_state=begin if memory else None,
    )
    terms: list[LossTerm] = [
        DenoisingTerm(weight=config.denoising_weight),
        RewardTerm(weight=config.reward_weight, scale=reward.scale, real_next=True),
    ]
    if done_head is not None:
        terms.append(DoneTerm(weight=config.done_weight, real_next=True))
    loss = WorldModelLoss(world_model, losses=terms)
    loss.set_keys(**specs.loss_keys)
    return world_model, loss


def _dynamics(
    specs: EnvSpecs, config: DiffusionConfig, shape: tuple[int, ...]
) -> DiffusionDynamics:
    sizes = {"context": config.context, "action_size": specs.action_size + 1}
    changes = levels = None
    if specs.pixels:
        network = DenoiserUNet(
            shape,
            channels=config.channels,
            depths=config.depths,
            attention=config.attention,
            condition_features=config.condition_features,
            **sizes,
        )
        if all(entry.dtype is torch.uint8 for entry in specs.pixels):
            levels = 255
    else:
        network = DenoiserMLP(
            *shape,
            hidden=config.hidden,
            noise_features=config.noise_features,
            **sizes,
        )
        changes = Normalizer(*shape, freeze_constant=True)
    offset = config.offset_noise if specs.pixels else 0.0
    sampler = DiffusionSampler(
        config.sampling_steps,
        config.sampler,
        low=config.sigma_min,
        high=config.sigma_max,
    )
    denoiser = Denoiser(network, len(shape), offset_noise=offset)
    return DiffusionDynamics(
        FrameModel(denoiser, sampler, changes=changes, levels=levels),
        UnitActions(specs.actions),
        shape,
        context=config.context,
        frame_key=_FRAME,
        action_keys=specs.action_keys,
        memory_keys=(_FRAMES, _ACTIONS),
    )


def _heads(
    specs: EnvSpecs, config: DiffusionConfig, shape: tuple[int, ...], remembers: bool
) -> tuple[TensorDictModuleBase, TerminationHead | None, DenormalizedNetwork]:
    """Return the heads of reward and termination; and the network that has the reward's unit."""
    judged: list[NestedKey] = [_FRAME, *specs.action_keys, join("next", _FRAME)]
    if remembers:
        judged = [join("next", _HIDDEN)]

    def network(out_features: int) -> nn.Module:
        if remembers:
            return _mlp(config, config.lstm_size, out_features)
        features = _features(specs, config, shape)
        network = _mlp(config, features.out_features, out_features)
        return _Judged(features, UnitActions(specs.actions), network, len(shape))

    reward = DenormalizedNetwork(
        network(specs.reward.size), [specs.float_reward("make_diffusion_world_model")]
    )
    reward_head: TensorDictModuleBase
    reward_head = TensorDictModule(reward, judged, [join("next", specs.reward.key)])
    if remembers:
        lstm = TransitionLSTM(
            _features(specs, config, shape),
            UnitActions(specs.actions),
            dims=len(shape),
            size=config.lstm_size,
        )
        reads = [_FRAME, *specs.action_keys, *_STATE, join("next", _FRAME)]
        moved = TensorDictModule(lstm, reads, [join("next", key) for key in _STATE])
        reward_head = TensorDictSequential(moved, reward_head)
    done_head = None
    if config.termination == "learned":
        ends = network(specs.done.size)
        done_head = end_head(TerminationHead, ends, judged, specs, config)
    return reward_head, done_head, reward


def _features(
    specs: EnvSpecs, config: DiffusionConfig, shape: tuple[int, ...]
) -> nn.Module:
    """Return a network of frame, next frame and action."""
    if not specs.pixels:
        return _VectorTransition(2 * shape[0] + specs.action_size)
    channels, height, width = shape
    images = ImageFeatures(
        2 * channels,
        height,
        width,
        condition_features=config.condition_features,
        channels=config.head_channels,
        depths=config.head_depths,
    )
    return _ImageTransition(images, specs.action_size, config.condition_features)


class _VectorTransition(nn.Module):
    """Frame, next frame and action of a transition side by side."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(
        self, frame: torch.Tensor, following: torch.Tensor, action: torch.Tensor
    ) -> torch.Tensor:
        return torch.cat([frame, following, action], -1)


class _ImageTransition(nn.Module):
    """Features of frame and next frame, two images, conditioned by the action."""

    def __init__(
        self, images: ImageFeatures, action_size: int, condition_features: int
    ) -> None:
        super().__init__()
        self.images = images
        self.condition = nn.Sequential(
            nn.Linear(action_size, condition_features),
            nn.SiLU(),
            nn.Linear(condition_features, condition_features),
        )
        self.out_features = images.out_features

    def forward(
        self, frame: torch.Tensor, following: torch.Tensor, action: torch.Tensor
    ) -> torch.Tensor:
        both = torch.cat([frame, following], 1)
        return self.images(both, self.condition(action))


class _Judged(nn.Module):
    """A network of a single transition, with any batch dims."""

    def __init__(
        self, features: nn.Module, actions: nn.Module, network: nn.Module, dims: int
    ) -> None:
        super().__init__()
        self.features, self.actions = features, actions
        self.network, self.dims = network, dims

    def forward(self, frame: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        *actions, following = rest
        lead = frame.shape[: frame.ndim - self.dims]
        rows = (frame, following, self.actions(*actions))
        rows = (row.reshape(-1, *row.shape[len(lead) :]) for row in rows)
        out = self.network(self.features(*rows))
        return out.reshape(*lead, out.shape[-1])


def _mlp(config: DiffusionConfig, in_features: int, out_features: int) -> MLP:
    return MLP(
        in_features,
        out_features,
        num_cells=list(config.hidden),
        activation_class=nn.SiLU,
    )
