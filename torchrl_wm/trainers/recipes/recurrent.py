"""The common base of Dreamer and PlaNet: a recurrent model learns from sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tensordict import NestedKey, TensorDictBase
from torchrl.envs import EnvBase
from torchrl.trainers.algorithms import DreamerV3UpdateRatio

from torchrl_wm.models import (
    make_rssm_world_model,
    make_transformer_world_model,
    RSSMConfig,
    TransformerConfig,
)
from torchrl_wm.trainers.env_checks import check_action, check_bounds, check_stacked
from torchrl_wm.trainers.recipe import Counts, make_replay, Recipe
from torchrl_wm.trainers.recipes.ensemble import transition_keys
from torchrl_wm.trainers.sequences import sample_sequences
from torchrl_wm.trainers.settings import AtLeast, PresetConfig


@dataclass(frozen=True, kw_only=True)
class RecurrentRunConfig(PresetConfig):
    """The settings of a run that learns a recurrent model.

    Args:
        termination: "learned", or "none" if episodes end only by time.
        belief_size: the size of the deterministic state; None for the preset's.
        hidden_size: the size of the hidden layers of prior and posterior; None for the preset's.
        num_cells: the size of the hidden layers of all other networks; None for the preset's.
        depth: the number of their hidden layers; None for the preset's.
        pixel_depth: the channels of the first stage of image networks; None for the preset's.
        batch_size: how many sequences a batch has; None for the preset's.
        batch_length: how many steps each of them has; None for the preset's.
        sequence_start: from which latents a replayed sequence begins: "anew", from none, as an
            episode does; or "stored", those that the filter had there when the step was made.
        train_ratio: how many steps are replayed for each real step; None for the preset's. An
            update replays batch_size times batch_length steps.
        replay_capacity: how many real steps are kept.
        replay_storage: where their images are kept, in memory or on the disk.
    """

    steps: Annotated[int, AtLeast(1)] | None = 10_000
    random_steps: Annotated[int, AtLeast(1)] = 500
    evaluation_interval: Annotated[int, AtLeast(0)] = 1000
    termination: Literal["learned", "none"] = "learned"
    belief_size: Annotated[int, AtLeast(1)] | None = None
    hidden_size: Annotated[int, AtLeast(1)] | None = None
    num_cells: Annotated[int, AtLeast(1)] | None = None
    depth: Annotated[int, AtLeast(1)] | None = None
    pixel_depth: Annotated[int, AtLeast(1)] | None = None
    batch_size: Annotated[int, AtLeast(1)] | None = None
    batch_length: Annotated[int, AtLeast(2)] | None = None
    # Stored latents of younger models are in no code that the newest one can read.
    sequence_start: Literal["anew", "stored"] = "anew"
    train_ratio: float | None = None
    replay_capacity: Annotated[int, AtLeast(1)] = 1_000_000
    replay_storage: Literal["memory", "disk"] = "memory"

    def __post_init__(self) -> None:
        super().__post_init__()
        length, number = self.size("batch_length"), self.size("batch_size")
        least = length * self.num_envs
        for name in ("random_steps", "replay_capacity"):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name}={getattr(self, name)} are fewer steps than a sequence of "
                    f"batch_length={length} in each of num_envs={self.num_envs} envs: give at "
                    f"least {least}, or shorter sequences."
                )
        ratio = self.size("train_ratio")
        learning = (self.steps or 0) - self.random_steps
        if self.steps and learning <= 0:
            raise ValueError(
                f"steps={self.steps} ends the run before it learns, within its "
                f"random_steps={self.random_steps}. Give more steps, or fewer random ones."
            )
        if ratio <= 0 or (self.steps and learning * ratio < length * number):
            raise ValueError(
                f"train_ratio={ratio} never trains: an update replays batch_size={number} "
                f"sequences of batch_length={length}, and the run makes {max(learning, 0)} steps "
                f"after its {self.random_steps} random ones. Give a larger train_ratio, smaller "
                f"batches or more steps."
            )

    def model_settings(self) -> RSSMConfig | TransformerConfig:
        """Return the settings of the world model."""
        raise NotImplementedError


class RecurrentRecipe(Recipe):
    """A recipe that learns a recurrent model from sequences.

    Args:
        config: the settings.
        env: the real env.

    Attributes:
        world_model: the recurrent model.
        loss: its loss, which hands out the filtered latents.
        ratio: says how many updates follow the newest steps.
        counts: ``counts.updates`` is how many updates have been made.
    """

    config: RecurrentRunConfig

    def __init__(self, config: RecurrentRunConfig, env: EnvBase) -> None:
        super().__init__(config, env)
        check_stacked(env)
        check_action(env)
        check_bounds(env.full_action_spec_unbatched[env.action_key], env.action_key)
        self.sizes = config.model_settings()
        is_rssm = isinstance(self.sizes, RSSMConfig)
        make = make_rssm_world_model if is_rssm else make_transformer_world_model
        self.world_model, self.loss = make(env, self.sizes)
        self.loss.return_latents = True
        self.loss.to(self.device)
        # Every real step, with the latents that the filter had there if sequences begin with them.
        self.replay = make_replay(
            config.replay_capacity, self.device, config.replay_storage
        )
        self._keys = [*transition_keys(env, self.world_model), *self.latents, "is_init"]
        replayed = config.size("batch_size") * config.size("batch_length")
        self.ratio = DreamerV3UpdateRatio(config.size("train_ratio") / replayed)
        self.counts = Counts(updates=0)

    def kept(self, steps: TensorDictBase) -> TensorDictBase:
        """Return the entries of real steps that the losses read."""
        return steps.select(*self._keys)

    def sample(self) -> TensorDictBase:
        """Return sequences of real steps, ``[batch_size, batch_length]``."""
        config = self.config
        return sample_sequences(
            self.replay,
            config.size("batch_size"),
            config.size("batch_length"),
            config.num_envs,
        )

    @property
    def latents(self) -> list[NestedKey]:
        is_stored = self.config.sequence_start == "stored"
        return list(self.world_model.latent_keys) if is_stored else []

    @property
    def has_learnt(self) -> bool:
        return self.counts.updates > 0
