"""The term that trains action values together with the world model (TD-MPC2)."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import InteractionType, set_interaction_type, TensorDictModuleBase
from torch import nn

from torchrl_wm.modules import QEnsemble, WorldModel
from torchrl_wm.modules.keys import join
from torchrl_wm.modules.modes import evaluation_mode
from torchrl_wm.modules.world_model.wiring import written_keys
from torchrl_wm.objectives.comparisons import (
    check_encoded,
    next_observations,
    per_sample,
    read_label,
    reward_label,
)
from torchrl_wm.objectives.keys import LossKeys
from torchrl_wm.objectives.terms import DoneTerm, LossContext, LossTerm


class ValueTerm(LossTerm):
    """Two-hot cross-entropy of an ensemble's action values and their TD targets.

    TD-MPC2 (arXiv 2310.16828, eq. 3 and 4). The target of ``Q(z_t, a_t)`` is
    ``r_t + gamma * (1 - terminated) * min Q'(z', policy(z'))``, with ``z'`` the
    encoding of the next observation, ``Q'`` the target networks, and the minimum
    over a few of them, drawn anew each time. The policy's action is sampled, whatever the
    exploration type. The target carries no gradient; that of the values reaches dynamics and
    encoder.

    The loss registers the ensemble, with target parameters
    ``target_q_ensemble_params``; move these with :class:`~torchrl.objectives.SoftUpdate`.

    Args:
        q_ensemble: the action values.
        policy: writes actions from latents. It is not trained here.
        gamma: the discount.
        weight: the factor of the term.
        subset: the number of target networks that the minimum is taken over; None for all.
        name: the loss appears as ``loss_<name>``.

    Raises:
        ValueError: if the policy does not write the actions that the ensemble
            reads.

    Examples:
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from torchrl.envs import GymEnv
        >>> from torchrl.modules import MLP
        >>> from torchrl.objectives import SoftUpdate
        >>> from torchrl_wm import WorldModelLoss
        >>> from torchrl_wm.models import (
        ...     make_tdmpc2_q_ensemble, make_tdmpc2_world_model, TDMPC2Config
        ... )
        >>> from torchrl_wm.objectives import ValueTerm
        >>> env, config = GymEnv("Pendulum-v1"), TDMPC2Config(latent_size=16, num_cells=16)
        >>> world_model, loss = make_tdmpc2_world_model(env, config)
        >>> q = make_tdmpc2_q_ensemble(env, config)
        >>> policy = Mod(MLP(16, 1, num_cells=[16]), ["latent"], ["action"])
        >>> loss = WorldModelLoss(
        ...     world_model, losses=[*loss.terms, ValueTerm(q, policy)], multi_step=True, decay=0.5
        ... )
        >>> target = SoftUpdate(loss, tau=0.01)
        >>> loss(env.rollout(30).reshape(10, 3))["loss_value"].requires_grad
        True
    """

    delayed = ("q_ensemble",)

    def __init__(
        self,
        q_ensemble: QEnsemble,
        policy: TensorDictModuleBase,
        *,
        gamma: float = 0.99,
        weight: float = 0.1,
        subset: int | None = 2,
        name: str = "value",
    ) -> None:
        super().__init__(name, weight)
        self.q_ensemble, self.policy = q_ensemble, policy
        self.gamma, self.subset = gamma, subset
        self._latents = q_ensemble.latent_keys
        self._actions = q_ensemble.in_keys[len(self._latents) :]
        written = written_keys(policy)
        missing = [key for key in self._actions if key not in written]
        if missing:
            raise ValueError(
                f"The loss {name!r} asks the policy for {self._actions}, and it writes {written}."
            )

    def modules(self) -> dict[str, nn.Module]:
        return {"q_ensemble": self.q_ensemble}

    def check(self, world_model: WorldModel) -> None:
        super().check(world_model)
        use = f"reads the latents {self._latents} of the next observation"
        check_encoded(self.name, use, self._latents, world_model)

    def labels(self, world_model: WorldModel, keys: LossKeys) -> list[NestedKey]:
        observed = next_observations(world_model)
        ends = [join("next", key) for key in (keys.terminated, keys.done)]
        return [*self._actions, join("next", keys.reward), *observed, *ends]

    def __call__(self, predicted, batch, loss) -> torch.Tensor:
        logits = self.q_ensemble.logits(
            [predicted.get(key) for key in self._latents],
            [read_label(batch, key, self.name) for key in self._actions],
        )
        target = self._target(batch, loss)  # [*B, 1]
        values = target.expand(*target.shape[:-1], logits.shape[-2])
        return per_sample(self.q_ensemble.two_hot.loss(logits, values), batch)

    @torch.no_grad()
    def _target(self, batch: TensorDictBase, loss: LossContext) -> torch.Tensor:
        """Return the TD targets of the values, ``[*B, 1]``."""
        q, keys = self.q_ensemble, loss.tensor_keys
        latents = loss.encode_next(batch).select(*self._latents)
        with evaluation_mode(q, self.policy):
            # Sampled, as in the paper, whatever the exploration type around the loss.
            with set_interaction_type(InteractionType.RANDOM):
                ahead = self.policy(latents)
            inputs = (
                [ahead.get(key) for key in names]
                for names in (self._latents, self._actions)
            )
            with loss.target_parameters("q_ensemble"):
                value = q.value(q.logits(*inputs), "min", self.subset)
        reward = reward_label(batch, keys, self.name)
        if reward.shape != value.shape:
            raise ValueError(
                f"The loss {self.name!r} adds rewards to values of the shape "
                f"{tuple(value.shape)}; {keys.reward!r} has {tuple(reward.shape)}."
            )
        terminated = DoneTerm.label(batch, loss).to(value.dtype)
        return reward + self.gamma * (1 - terminated) * value
