"""The loss that trains a policy on latents by action values (TD-MPC2)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.modules import ProbabilisticActor

from torchrl_wm.modules import QEnsemble
from torchrl_wm.modules.keys import join
from torchrl_wm.modules.modes import evaluation_mode
from torchrl_wm.modules.world_model.wiring import written_keys
from torchrl_wm.objectives.networks import swapped_parameters
from torchrl_wm.objectives.processes import TrainedTogether


class ValueScale(nn.Module):
    """The running range of values: from their 5th to their 95th percentile, at least 1.

    TD-MPC2 (arXiv 2310.16828, appendix H) divides the policy's values by it, so that one
    entropy weight serves tasks of all scales of reward.

    Args:
        tau: the share of a batch's range in the running one.
        low, high: the percentiles, as shares.

    Raises:
        ValueError: if ``tau`` or the percentiles are not in their ranges.

    Examples:
        >>> import torch
        >>> from torchrl_wm.objectives import ValueScale
        >>> scale = ValueScale(tau=1.0)
        >>> scale.update(torch.linspace(0, 100, 101))
        >>> scale.value.item()
        90.0
    """

    def __init__(
        self, tau: float = 0.01, low: float = 0.05, high: float = 0.95
    ) -> None:
        super().__init__()
        if not 0 < tau <= 1 or not 0 <= low < high <= 1:
            raise ValueError(
                f"0 < tau <= 1 and 0 <= low < high <= 1 are needed, got tau={tau}, low={low} and "
                f"high={high}."
            )
        self.tau = tau
        self.register_buffer("value", torch.ones(()))
        self.register_buffer("shares", torch.tensor([low, high]), persistent=False)

    @torch.no_grad()
    def update(self, values: torch.Tensor) -> None:
        """Move the range towards that of a batch of values, of any shape."""
        low, high = values.flatten().quantile(self.shares.to(values.dtype))
        self.value.lerp_((high - low).clamp_min(1.0).to(self.value.dtype), self.tau)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values in units of the range."""
        return values / self.value


class PolicyPriorLoss(TrainedTogether):
    """The loss that trains a policy to act well by the action values, and to stay random.

    It is that of TD-MPC2 (arXiv 2310.16828, eq. 5). At the latents ``z_0 ... z_T`` that the world
    model's loss rolled in the same update, it raises ``Q(z_t, a_t) / S + entropy_weight * H``,
    with actions ``a_t`` of the policy, ``S`` the running range of the values
    (:class:`ValueScale`) and ``H`` the entropy times the number of elements of the action. Step
    ``t`` counts ``decay ** t``; steps after the end of an episode do not count. If the action is
    a choice, the value is the mean over all options, weighted by their probabilities, in place of
    one sample.

    No gradient reaches the values or the latents.

    Args:
        policy: the policy, which reads latents, such as
            :func:`~torchrl_wm.models.make_tdmpc2_policy`.
        q_ensemble: the action values.

    Keyword Args:
        decay: the weight of a step relative to the one before it.
        entropy_weight: the weight of the entropy.
        subset: the number of networks, drawn anew each time, whose mean the value is; None for
            all.
        scale: the running range; one with the default settings by default.

    Raises:
        ValueError: if the policy does not write the action that the values read, or ``decay`` is
            not in (0, 1].

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm import WorldModelLoss
        >>> from torchrl_wm.models import (
        ...     make_tdmpc2_policy, make_tdmpc2_q_ensemble, make_tdmpc2_world_model, TDMPC2Config
        ... )
        >>> from torchrl_wm.objectives import PolicyPriorLoss
        >>> env, config = GymEnv("Pendulum-v1"), TDMPC2Config(latent_size=16, num_cells=16)
        >>> world_model, loss = make_tdmpc2_world_model(env, config)
        >>> policy_loss = PolicyPriorLoss(
        ...     make_tdmpc2_policy(env, config), make_tdmpc2_q_ensemble(env, config)
        ... )
        >>> loss.return_latents = True
        >>> latents = loss(env.rollout(30).reshape(10, 3))["latents"]
        >>> policy_loss(latents)["loss_policy"].requires_grad
        True
    """

    def __init__(
        self,
        policy: ProbabilisticActor,
        q_ensemble: QEnsemble,
        *,
        decay: float = 0.5,
        entropy_weight: float = 1e-4,
        subset: int | None = 2,
        scale: ValueScale | None = None,
    ) -> None:
        super().__init__()
        self._latents = q_ensemble.latent_keys
        actions = q_ensemble.in_keys[len(self._latents) :]
        if len(actions) != 1 or actions[0] not in written_keys(policy):
            raise ValueError(
                f"The policy writes {written_keys(policy)}, and the values read the actions "
                f"{actions}. They must be one action, the same."
            )
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {decay}.")
        self.policy = policy
        #: Not registered: this loss does not train them.
        self.__dict__["q_ensemble"] = q_ensemble
        self.decay, self.entropy_weight, self.subset = decay, entropy_weight, subset
        self.scale = ValueScale() if scale is None else scale
        self._numbers = q_ensemble.actions.entries[0].size

    def forward(self, latents: TensorDictBase) -> TensorDict:
        """Return the loss of a policy on rolled latents.

        Args:
            latents: those of :class:`~torchrl_wm.WorldModelLoss`, ``[*B, T]``: the
                latents at the root, those that follow under "next", and ``("collector",
                "mask")``.

        Returns:
            ``"loss_policy"``, to be minimised, and, without gradient, ``"entropy"`` and
            ``"value_scale"``: scalars.
        """
        steps, valid = self._steps(latents)
        # Gradients of the values reach the actions, and not the parameters of the values.
        frozen = TensorDict.from_module(self.q_ensemble).detach()
        with evaluation_mode(self.q_ensemble), swapped_parameters(
            self.q_ensemble, frozen
        ):
            values, entropy = self._values(steps)  # [*B, T + 1]
        self.scale.update(self.processes.gather(values[..., 0]))
        gain = self.scale(values) + self.entropy_weight * self._numbers * entropy
        time = torch.arange(gain.shape[-1], device=gain.device)
        weight = valid.to(gain.dtype)
        count = self.processes.average(weight.sum())
        count = count.clamp_min(torch.finfo(weight.dtype).tiny)
        loss = -(self.decay**time * gain * weight).sum() / count
        mean = (entropy.detach() * weight).sum() / count
        return TensorDict(
            {
                "loss_policy": loss,
                "entropy": mean,
                "value_scale": self.scale.value.clone(),
            }
        )

    def _steps(self, latents: TensorDictBase) -> tuple[TensorDict, torch.Tensor]:
        """Return the latents ``z_0 ... z_T``, ``[*B, T + 1]``, and which of them count."""
        joined = {
            key: torch.cat(
                [latents.get(key), latents.get(join("next", key))[..., -1:, :]], -2
            )
            for key in self._latents
        }
        mask = latents.get(("collector", "mask"), None)
        size = (*latents.batch_size[:-1], latents.batch_size[-1] + 1)
        if mask is None:
            valid = torch.ones(size, dtype=torch.bool, device=latents.device)
        else:
            valid = torch.cat([mask, mask[..., -1:]], -1)
        return TensorDict(joined, batch_size=size), valid

    def _values(self, steps: TensorDict) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values of the policy's actions and its entropy, ``[*B, T + 1]`` each."""
        dist = self.policy.get_dist(steps)
        latents = [steps.get(key) for key in self._latents]
        q = self.q_ensemble
        if not dist.has_rsample:
            chances = dist.probs  # [*B, T + 1, n]
            with torch.no_grad():
                values = torch.cat(
                    [
                        q.value(q.logits(latents, [action]), "mean", self.subset)
                        for action in self._options(chances)
                    ],
                    -1,
                )
            logs = chances.clamp_min(1e-8).log()
            return (chances * values).sum(-1), -(chances * logs).sum(-1)
        action = dist.rsample()
        entropy = -dist.log_prob(action)
        value = q.value(q.logits(latents, [action]), "mean", self.subset).squeeze(-1)
        return value, entropy.reshape(value.shape)

    def _options(self, chances: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the options of a choice as actions, in the form that the values read."""
        entry = self.q_ensemble.actions.entries[0]
        size, count = chances.shape[:-1], chances.shape[-1]
        for number in range(count):
            if entry.classes:
                yield torch.full(size, number, device=chances.device)
            else:
                action = torch.zeros(*size, count, device=chances.device)
                action[..., number] = 1
                yield action
