"""TorchRL's RSSM networks as components of a world model.

TorchRL's :class:`~torchrl.modules.RSSMPrior` and :class:`~torchrl.modules.RSSMPriorV3` take one
float action and at most one batch dim; here they take any actions and batch dims, and compute
the same.
"""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import dispatch, TensorDictModuleBase
from torch import nn
from torchrl.modules import RSSMPrior

from torchrl_wm.modules.blocks.entries import JoinEntries
from torchrl_wm.modules.keys import as_tuple, is_next, join, strip_next, unique
from torchrl_wm.modules.world_model.wiring import written_keys
from torchrl_wm.modules.world_model.world_model import WorldModel

#: The dtype to which TorchRL's Gaussian prior casts on its way into the GRU.
_FLOAT = torch.float32


class RSSMDynamics(nn.Module):
    """An RSSM's prior, for any batch shape and any actions.

    Args:
        prior: TorchRL's :class:`~torchrl.modules.RSSMPrior` (PlaNet and Dreamer,
            arXiv 1811.04551, 1912.01603) or :class:`~torchrl.modules.RSSMPriorV3`
            (DreamerV2 and V3, arXiv 2010.02193, 2301.04104).
        actions: makes one float vector of the actions; by default there is one action,
            which is that vector.

    Examples:
        >>> import torch
        >>> from torchrl.data import Categorical
        >>> from torchrl.modules import RSSMPriorV3
        >>> from torchrl_wm.modules import Entry, JoinEntries, RSSMDynamics
        >>> prior = RSSMPriorV3(
        ...     action_shape=(3,), action_dim=3, hidden_dim=8, rnn_hidden_dim=8,
        ...     num_categoricals=2, num_classes=4,
        ... )
        >>> actions = JoinEntries([Entry.from_spec("action", Categorical(3))])
        >>> dynamics = RSSMDynamics(prior, actions)
        >>> state, belief = torch.zeros(2, 5, 8), torch.zeros(2, 5, 8)
        >>> logits, state, belief = dynamics(state, belief, torch.ones(2, 5, dtype=torch.int64))
        >>> logits.shape, state.shape, belief.shape
        (torch.Size([2, 5, 2, 4]), torch.Size([2, 5, 8]), torch.Size([2, 5, 8]))
    """

    def __init__(self, prior: nn.Module, actions: JoinEntries | None = None) -> None:
        super().__init__()
        self.prior, self.actions = prior, actions

    def forward(
        self, state: torch.Tensor, belief: torch.Tensor, *actions: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Predict the next state.

        Args:
            state: the stochastic state, ``[*B, S]``.
            belief: the deterministic state, ``[*B, D]``.
            actions: as their specs say, ``[*B, ...]``.

        Returns:
            The prior's statistics (mean and scale ``[*B, S]``, or logits ``[*B,
            categoricals, classes]``), a state drawn from it, the next belief.
        """
        action = actions[0] if self.actions is None else self.actions(*actions)
        network = self.prior
        if isinstance(network, RSSMPrior) and network.rnn.weight_hh.dtype is not _FLOAT:
            network = self._gaussian_prior
        return _on_rows(network, belief.shape[:-1], state, belief, action)

    def _gaussian_prior(
        self, state: torch.Tensor, belief: torch.Tensor, action: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Do what ``RSSMPrior`` does, with weights of another dtype, which its GRU cannot have."""
        prior = self.prior
        hidden = prior.action_state_projector(torch.cat([state, action], -1))
        belief = prior.rnn(hidden, belief)
        mean, std = prior.rnn_to_prior_projector(belief)
        return mean, std, mean + std * torch.randn_like(std), belief


class RSSMPosteriorHead(nn.Module):
    """An RSSM's posterior, for any batch shape.

    Args:
        posterior: TorchRL's :class:`~torchrl.modules.RSSMPosterior` or
            :class:`~torchrl.modules.RSSMPosteriorV3`.

    Examples:
        >>> import torch
        >>> from torchrl.modules import RSSMPosterior
        >>> from torchrl_wm.modules import RSSMPosteriorHead
        >>> posterior = RSSMPosteriorHead(
        ...     RSSMPosterior(hidden_dim=8, state_dim=3, rnn_hidden_dim=5, obs_embed_dim=7)
        ... )
        >>> mean, scale, state = posterior(torch.zeros(2, 4, 5), torch.zeros(2, 4, 7))
        >>> state.shape
        torch.Size([2, 4, 3])
    """

    def __init__(self, posterior: nn.Module) -> None:
        super().__init__()
        self.posterior = posterior

    def forward(
        self, belief: torch.Tensor, embedding: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Correct a predicted state.

        Args:
            belief: the predicted one, ``[*B, D]``.
            embedding: that of the observation, ``[*B, M]``.

        Returns:
            The posterior's statistics, and a state drawn from it, ``[*B, S]``.
        """
        return _on_rows(self.posterior, belief.shape[:-1], belief, embedding)


class ContinuationModel(TensorDictModuleBase):
    """The probability that an episode goes on, as TorchRL's DreamerV3 losses read it.

    :class:`~torchrl.objectives.DreamerV3ActorLoss` weighs imagined steps by a
    ``continuation_model``, which reads latents at the root. This one runs a world
    model's done head, and shares its parameters.

    Args:
        world_model: a model whose done head reads next latents and writes
            ``terminated_logits`` or ``continue_pred``.
        out_key: the key of the probability, ``[*B, 1]``.

    Raises:
        ValueError: if the done head is missing or of another kind.

    Examples:
        >>> import torch
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from torchrl.modules import MLP
        >>> from torchrl_wm import WorldModel
        >>> from torchrl_wm.modules import ContinuationModel
        >>> world_model = WorldModel(
        ...     Mod(torch.nn.Linear(3, 4), ["observation"], ["latent"]),
        ...     Mod(MLP(5, 4, num_cells=[8]), ["latent", "action"], [("next", "latent")]),
        ...     Mod(torch.nn.Linear(4, 1), [("next", "latent")], [("next", "reward")]),
        ...     done_head=Mod(
        ...         torch.nn.Linear(4, 1), [("next", "latent")], [("next", "continue_pred")]
        ...     ),
        ... )
        >>> ContinuationModel(world_model)(latent=torch.randn(5, 4)).shape
        torch.Size([5, 1])
    """

    def __init__(
        self, world_model: WorldModel, out_key: NestedKey = "continuation"
    ) -> None:
        super().__init__()
        self.world_model = world_model
        self._logits, self._goes_on = self._find(world_model)
        reads = unique(world_model.done_head.in_keys)
        latents = [join("next", key) for key in world_model.latent_keys]
        if not set(reads) <= set(latents):
            raise ValueError(
                f"ContinuationModel runs the done head on latents only, and it reads "
                f"{reads}; the next latents are {latents}."
            )
        self.in_keys = [strip_next(key) for key in reads]
        self.out_keys = [out_key]

    @staticmethod
    def _find(world_model: WorldModel) -> tuple[NestedKey, bool]:
        """Return the key of the done head's logits, and whether they are logits of going on."""
        head = world_model.done_head
        written = [] if head is None else [k for k in written_keys(head) if is_next(k)]
        for key in written:
            if as_tuple(key)[-1] in ("continue_pred", "terminated_logits"):
                return key, as_tuple(key)[-1] == "continue_pred"
        raise ValueError(
            "ContinuationModel needs a done_head that writes ('next', 'continue_pred') or "
            "('next', 'terminated_logits'); "
            + ("the model has none." if head is None else f"it writes {written}.")
        )

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the probability of going on from the latents in ``tensordict``, ``[*B]``."""
        inputs = TensorDict({}, batch_size=tensordict.batch_size)
        for key in self.in_keys:
            inputs.set(join("next", key), tensordict.get(key))
        logits = self.world_model.done_head(inputs).get(self._logits)
        probability = (logits if self._goes_on else -logits).sigmoid()
        return tensordict.set(self.out_keys[0], probability)


def _on_rows(
    network: nn.Module, size: torch.Size, *inputs: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Call a network that takes at most one batch dim, on any ``size``."""
    if len(size) == 1:
        return network(*inputs)
    outputs = network(*(value.reshape(-1, value.shape[-1]) for value in inputs))
    return tuple(value.reshape(*size, *value.shape[1:]) for value in outputs)
