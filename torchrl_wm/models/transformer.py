"""World models that are transformers over time, from an env's specs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs import EnvBase

from torchrl_wm.models.building import build, register
from torchrl_wm.models.env_specs import EnvSpecs
from torchrl_wm.models.latents import (
    LatentDecoder,
    LatentEncoder,
    plain_mlp,
    predictive_terms,
    termination_head,
    unit_size,
)
from torchrl_wm.modules import (
    CausalTransformer,
    DenormalizedNetwork,
    JoinEntries,
    WorldModel,
)
from torchrl_wm.modules.keys import join
from torchrl_wm.modules.world_model.filtering import may_begin
from torchrl_wm.objectives import WorldModelLoss

_LATENT, _BELIEF, _CACHE, _COUNT = "latent", "belief", "cache", "step_in_context"


@dataclass(frozen=True)
class TransformerConfig:
    """The settings of :func:`make_transformer_world_model`.

    Args:
        observation_keys: the observations to model; all by default.
        latent_size: ``L``. Latents have a root mean square of 1.
        tokens: how many tokens a latent is cut into, which divides ``latent_size``: one for
            vectors, more for images.
        width: the size of a token in the transformer, and of the belief, ``D``.
        layers, heads: the number of its blocks, and of the heads of each.
        context: how many steps it sees, the present one included, ``W``.
        hidden: the sizes of the hidden layers of encoder, decoder and heads.
        activation: ``"silu"``, ``"relu"``, ``"elu"``, ``"gelu"``, ``"mish"`` or ``"tanh"``.
        normalize: normalise vector observations and rewards.
        pixel_depth, pixel_multipliers: the ``depth`` and the ``multipliers`` of the image
            networks; see :class:`~torchrl_wm.modules.PixelEncoder`.
        termination: ``"learned"``, or ``"none"`` if only a time limit ends episodes.
        termination_threshold: the probability above which an episode ends.
        sample_termination: draw terminations from their probability instead.
        reward_weight, reconstruction_weight, latent_weight, done_weight: the weights of
            the losses.

    Raises:
        ValueError: if ``tokens`` does not divide ``latent_size``, or ``heads`` the ``width``.
    """

    observation_keys: tuple[NestedKey, ...] | None = None
    latent_size: int = 64
    tokens: int = 1
    width: int = 64
    layers: int = 2
    heads: int = 4
    context: int = 16
    hidden: tuple[int, ...] = (128,)
    activation: str = "silu"
    normalize: bool = True
    pixel_depth: int = 16
    pixel_multipliers: tuple[int, ...] | None = None
    termination: Literal["learned", "none"] = "learned"
    termination_threshold: float = 0.5
    sample_termination: bool = False
    reward_weight: float = 1.0
    reconstruction_weight: float = 1.0
    latent_weight: float = 1.0
    done_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("tokens", "layers", "heads", "context"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}."
                )
        if self.latent_size % self.tokens or self.latent_size < 2:
            raise ValueError(
                f"latent_size must be at least 2, and tokens divide it, got "
                f"latent_size={self.latent_size} and tokens={self.tokens}."
            )
        if self.width % self.heads:
            raise ValueError(
                f"heads must divide width, got heads={self.heads} and width={self.width}."
            )

    @classmethod
    def storm(cls, **settings: Any) -> TransformerConfig:
        """Return the transformer of STORM (arXiv 2310.09615): a token a step, 2 blocks of 512.

        Its latents are categorical and its rewards two-hot; here, latents are predicted
        without noise.
        """
        sizes = {"latent_size": 1024, "width": 512, "layers": 2, "heads": 8}
        return cls(**{**sizes, "context": 64, "hidden": (512,), **settings})

    @classmethod
    def iris(cls, **settings: Any) -> TransformerConfig:
        """Return the transformer of IRIS (arXiv 2209.00588): 16 tokens a frame, 10 blocks of 256.

        Its tokens are of a learned codebook and predicted one after the other; here, those of
        a frame are predicted together. Its action is a token of its own, and here part of each.
        """
        sizes = {"latent_size": 1024, "tokens": 16, "width": 256, "layers": 10}
        return cls(**{**sizes, "context": 20, "hidden": (256,), **settings})


def make_transformer_world_model(
    env: EnvBase, config: TransformerConfig | None = None, **overrides: Any
) -> tuple[WorldModel, WorldModelLoss]:
    """Make a world model whose dynamics are a transformer over time.

    Observations of all kinds are encoded as one ``"latent"``. A causal transformer reads the
    latents and the actions of the last ``context`` steps and predicts the change of the latent;
    what it made of them, ``"belief"``, is what reward and termination are read from, and a state
    for policies where single observations do not tell all. Sequences are trained in one pass;
    imagined step by step, keys and values of earlier steps stay in a cache, which is ``memory``:
    no rollout or buffer holds it. The loss takes sequences ``[*B, T]``. It compares the decoded
    predictions with the next observations, in units of their own spread, and the predicted
    latents with the encodings of the next observations. Fit the normalisers before training::

        fit_normalizers(world_model, batch)

    Imagination that starts from one observation has seen nothing before it; that which starts
    from ``world_model.burn_in(sequences)`` has.

    Args:
        env: the env whose specs are read. Vector, dictionary and image
            observations, continuous, discrete and multi-dimensional actions.
        config, overrides: the settings, as a whole and by name.

    Returns:
        The model and its loss.

    Raises:
        TypeError: for an unknown setting.
        ValueError: for an entry that the model cannot serve, such as class numbers among
            the observations; the message names it.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm import WorldModelEnv
        >>> from torchrl_wm.models import make_transformer_world_model
        >>> from torchrl_wm.modules import fit_normalizers
        >>> real_env = GymEnv("CartPole-v1")
        >>> world_model, loss = make_transformer_world_model(real_env, width=16, latent_size=8)
        >>> batch = real_env.rollout(50, break_when_any_done=False).unsqueeze(0)  # [1, T]
        >>> fit_normalizers(world_model, batch)
        >>> sorted(loss(batch).keys())
        ['loss_done', 'loss_latent', 'loss_reconstruction', 'loss_reward']
        >>> world_model.latent_keys, world_model.memory_keys
        (['latent', 'belief'], ['cache', 'step_in_context'])
        >>> env = WorldModelEnv(world_model, real_env, decode=True)
        >>> imagined = env.imagine(5, tensordict=world_model.burn_in(batch))
        >>> imagined["next", "observation"].shape
        torch.Size([1, 5, 4])
    """
    return build("transformer", env, config, overrides)


@register("transformer", TransformerConfig, reserved=(_LATENT, _BELIEF, _CACHE, _COUNT))
def _wire(
    specs: EnvSpecs, config: TransformerConfig
) -> tuple[WorldModel, WorldModelLoss]:
    decoder = LatentDecoder(specs, config)
    believed = [join("next", _BELIEF)]
    reward = DenormalizedNetwork(
        plain_mlp(config, config.width, specs.reward.size),
        [specs.float_reward("make_transformer_world_model")],
        normalize=config.normalize,
    )
    dynamics = _Dynamics(specs, config)
    carried = [_LATENT, _BELIEF, _CACHE, _COUNT]
    reads = [*carried, *specs.action_keys]
    sequence_reads = [_LATENT, *specs.action_keys, "is_init"]
    nexts = [join("next", key) for key in carried]
    begin = {
        _BELIEF: torch.zeros(config.width),
        _CACHE: dynamics.transformer.initial_cache(config.tokens)[0],
        _COUNT: torch.zeros(1, dtype=torch.int64),
    }
    world_model = WorldModel(
        TensorDictModule(
            LatentEncoder(specs, config, unit_size(config.latent_size)),
            specs.observation_keys,
            [_LATENT],
        ),
        TensorDictModule(dynamics, reads, nexts),
        TensorDictModule(reward, believed, [join("next", specs.reward.key)]),
        done_head=termination_head(specs, config, _BELIEF, config.width),
        decoder=TensorDictModule(decoder, [_LATENT], specs.observation_keys),
        initial_state=TensorDict(begin),
        memory=[_CACHE, _COUNT],
        sequence=TensorDictModule(_Sequence(dynamics), sequence_reads, nexts[:2]),
    )
    terms = predictive_terms(world_model, config, reward, decoder)
    loss = WorldModelLoss(world_model, losses=terms)
    loss.set_keys(**specs.loss_keys)
    return world_model, loss


class _Dynamics(nn.Module):
    """One step: the transformer sees the newest latent and action, and its cache of those before."""

    def __init__(self, specs: EnvSpecs, config: TransformerConfig) -> None:
        super().__init__()
        self.tokens = config.tokens
        size = config.latent_size // config.tokens
        self.actions = JoinEntries(specs.actions)
        self.of_latent = nn.Linear(size, config.width)
        self.of_action = nn.Linear(specs.action_size, config.width, bias=False)
        place = torch.randn(config.tokens, config.width) * 0.02
        self.of_place = nn.Parameter(place)
        self.transformer = CausalTransformer(
            config.width,
            layers=config.layers,
            heads=config.heads,
            context=config.context,
        )
        self.change = nn.Linear(config.width, size)
        self.norm = unit_size(config.latent_size)

    def embed(self, latent: torch.Tensor, *actions: torch.Tensor) -> torch.Tensor:
        """Return the tokens of steps, ``[*B, K, D]``."""
        parts = latent.unflatten(-1, (self.tokens, -1))
        action = self.of_action(self.actions(*actions)).unsqueeze(-2)
        return self.of_latent(parts) + action + self.of_place

    def predict(
        self, latent: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next latents and beliefs, from what the tokens have become."""
        change = self.change(tokens).flatten(-2)
        return self.norm(latent + change), tokens.mean(-2)

    def forward(
        self,
        latent: torch.Tensor,
        belief: torch.Tensor,
        cache: torch.Tensor,
        count: torch.Tensor,
        *actions: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        size = latent.shape[:-1]  # *B
        tokens = self.embed(latent, *actions)
        flat = (x.reshape(-1, *x.shape[len(size) :]) for x in (tokens, cache, count))
        tokens, cache = self.transformer.step(*flat)
        latent, belief = self.predict(latent, tokens.reshape(*size, *tokens.shape[1:]))
        return latent, belief, cache.reshape(*size, *cache.shape[1:]), count + 1


class _Sequence(nn.Module):
    """All steps of sequences ``[*B, T]`` in one pass."""

    def __init__(self, dynamics: _Dynamics) -> None:
        super().__init__()
        self.dynamics = dynamics

    def forward(
        self, latent: torch.Tensor, *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        *actions, begins = inputs
        size = latent.shape[:-1]  # *B, T
        tokens = self.dynamics.embed(latent, *actions)
        flat = tokens.reshape(-1, size[-1], *tokens.shape[-2:])
        begins = begins.reshape(-1, size[-1])
        episodes = begins if may_begin(begins) else None
        tokens = self.dynamics.transformer(flat, episodes)
        return self.dynamics.predict(latent, tokens.reshape(*size, *tokens.shape[-2:]))
