"""Heads: terminations, Gaussians, and functions that the user knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log, prod

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule
from torch import nn

from torchrl_wm.modules.blocks.entries import Entry
from torchrl_wm.modules.blocks.gaussian import BoundedLogVar
from torchrl_wm.modules.keys import as_tuple, join, sibling
from torchrl_wm.modules.modes import draws


class TerminationHead(TensorDictModule):
    """A head that predicts terminations: logits to train, bools to step on, a probability.

    ==================================  =========================  =====================
    writes, beside the done entry       shape                      what
    ==================================  =========================  =====================
    ``("next", "terminated_logits")``   ``[*B, 1]`` float          logits that the loss trains
    ``("next", "terminated")``          ``[*B, 1]`` bool           ends episodes of the env
    ``("next", "continue_prob")``       ``[*B, 1]`` float          probability of going on
    ==================================  =========================  =====================

    To have the probability of going on in imagined data, for example as a discount,
    declare it: ``WorldModelEnv(..., observation_spec=Composite(
    continue_prob=Unbounded((1,))))``.

    Args:
        network: maps its inputs to the logits, ``[*B, 1]``.
        in_keys: the keys that it reads.

    Keyword Args:
        done_key: the done entry of the env.
        shape: its feature shape; the network may write it flattened.
        threshold: the probability of terminating above which the episode ends.
        sample: draw whether it ends with that probability, instead of comparing
            it with the threshold. Under any ``set_interaction_type`` but ``"random"``,
            the threshold decides.

    Raises:
        ValueError: if the threshold is not a probability.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_wm.modules import TerminationHead
        >>> head = TerminationHead(torch.nn.Linear(3, 1), [("next", "observation")])
        >>> td = TensorDict({"next": {"observation": torch.zeros(5, 3)}}, [5])
        >>> sorted(head(td)["next"].keys())
        ['continue_prob', 'observation', 'terminated', 'terminated_logits']
    """

    #: The name under which the logits are written.
    logits_name = "terminated_logits"
    _goes_on = False

    def __init__(
        self,
        network: nn.Module,
        in_keys: Sequence[NestedKey],
        *,
        done_key: NestedKey = "done",
        shape: Sequence[int] = (1,),
        threshold: float = 0.5,
        sample: bool = False,
    ) -> None:
        if not 0 < threshold < 1:
            raise ValueError(
                f"threshold is a probability between 0 and 1, got {threshold}."
            )
        names = (self.logits_name, "terminated", "continue_prob")
        super().__init__(
            _Ending(network, tuple(shape), threshold, sample, self._goes_on),
            list(in_keys),
            [join("next", sibling(done_key, name)) for name in names],
        )


class ContinueHead(TerminationHead):
    """A head that predicts whether an episode goes on, as Dreamer does.

    It is a :class:`TerminationHead`, except that the network's logits are those of *not*
    terminating, and stand under ``("next", "continue_pred")``, TorchRL's name for them.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_wm.modules import ContinueHead
        >>> head = ContinueHead(torch.nn.Linear(3, 1), [("next", "latent")], threshold=0.9)
        >>> td = head(TensorDict({"next": {"latent": torch.zeros(5, 3)}}, [5]))
        >>> sorted(td["next"].keys())
        ['continue_pred', 'continue_prob', 'latent', 'terminated']
    """

    logits_name = "continue_pred"
    _goes_on = True


class _OnNetwork(nn.Module):
    """A part of a head around a network, which may normalise its inputs."""

    network: nn.Module

    @property
    def fit_normalizer(self) -> Callable[..., None]:
        """The network's own function; there is none if it does not normalise its inputs."""
        return self.network.fit_normalizer


class _Ending(_OnNetwork):
    """Logits, bools and a probability from one network."""

    def __init__(
        self,
        network: nn.Module,
        shape: tuple[int, ...],
        threshold: float,
        sample: bool,
        goes_on: bool,
    ) -> None:
        super().__init__()
        self.network, self.shape, self.sample = network, shape, sample
        self.goes_on = goes_on
        # The logit at which the probability of terminating equals the threshold.
        self.limit = log(threshold / (1 - threshold))

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = _shaped(self.network(*inputs), self.shape)
        ending = -logits if self.goes_on else logits
        going_on = torch.sigmoid(-ending)
        if self.sample and draws():
            terminated = torch.rand_like(going_on) >= going_on
        else:
            terminated = ending > self.limit
        return logits, terminated, going_on


class GaussianHead(TensorDictModule):
    """A head that predicts an entry as a Gaussian with bounded variance.

    ============================  =====================  ==========================
    writes                        shape                  value
    ============================  =====================  ==========================
    ``out_key``                   ``[*B, *shape]``       the mean, or a sample
    ``<out_key>_loc``             ``[*B, *shape]``       the mean
    ``<out_key>_log_var``         ``[*B, *shape]``       the log-variance
    ============================  =====================  ==========================

    :meth:`torchrl_wm.objectives.GaussianNLLTerm.of_head` trains it.

    Args:
        network: maps its inputs to ``[*B, 2 * D]``: ``D`` means and ``D`` raw
            log-variances, ``D`` being the size of ``shape``.
        in_keys: the keys that it reads.
        out_key: the key that it predicts, such as ``("next", "reward")``.

    Keyword Args:
        shape: the feature shape of the entry.
        sample: write samples, by reparametrisation, in place of means, unless
            ``set_interaction_type`` says otherwise (mode, mean, deterministic).
        log_var: keeps the log-variance within bounds; a :class:`BoundedLogVar` by default.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_wm.modules import GaussianHead
        >>> head = GaussianHead(torch.nn.Linear(3, 2), [("next", "latent")], ("next", "reward"))
        >>> td = head(TensorDict({"next": {"latent": torch.zeros(5, 3)}}, [5]))
        >>> sorted(td["next"].keys())
        ['latent', 'reward', 'reward_loc', 'reward_log_var']
    """

    def __init__(
        self,
        network: nn.Module,
        in_keys: Sequence[NestedKey],
        out_key: NestedKey,
        *,
        shape: Sequence[int] = (1,),
        sample: bool = False,
        log_var: BoundedLogVar | None = None,
    ) -> None:
        name = as_tuple(out_key)[-1]
        statistics = [sibling(out_key, f"{name}_{part}") for part in ("loc", "log_var")]
        if log_var is None:
            log_var = BoundedLogVar(prod(shape))
        super().__init__(
            _Gaussian(network, tuple(shape), sample, log_var),
            list(in_keys),
            [out_key, *statistics],
        )


class _Gaussian(_OnNetwork):
    """Value, mean and log-variance from one network."""

    def __init__(
        self,
        network: nn.Module,
        shape: tuple[int, ...],
        sample: bool,
        log_var: BoundedLogVar,
    ) -> None:
        super().__init__()
        self.network, self.shape, self.sample = network, shape, sample
        self.log_var = log_var

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = self.network(*inputs)
        if out.shape[-1] != 2 * prod(self.shape):
            raise ValueError(
                f"The network of a GaussianHead of the shape {self.shape} must write "
                f"{2 * prod(self.shape)} numbers, means and log-variances, and writes "
                f"{out.shape[-1]}."
            )
        loc, raw = out.chunk(2, -1)
        log_var = self.log_var(raw)
        value = loc.clone()
        if self.sample and draws():
            value = loc + (log_var / 2).exp() * torch.randn_like(loc)
        return tuple(_shaped(part, self.shape) for part in (value, loc, log_var))


class FunctionHead(TensorDictModule):
    """A reward or termination function that the user knows, as PETS and MBPO have them.

    ``function(observation, action, next_observation)`` returns ``[*B]`` or
    ``[*B, 1]`` for any batch dims ``*B``. It gets several observations or actions as a
    dictionary by key.

    Args:
        function: the function.
        observations: the observations, which are the latents.
        actions: the actions.
        out: the entry that it computes, below "next": the reward, or a bool such
            as ``terminated``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Unbounded
        >>> from torchrl_wm.modules import Entry, FunctionHead
        >>> def reward(observation, action, next_observation):
        ...     return -next_observation[..., 0].abs() - 0.1 * action[..., 0] ** 2
        >>> head = FunctionHead(
        ...     reward,
        ...     [Entry.from_spec("observation", Unbounded((3,)))],
        ...     [Entry.from_spec("action", Unbounded((1,)))],
        ...     Entry.from_spec("reward", Unbounded((1,))),
        ... )
        >>> td = TensorDict({"observation": torch.zeros(5, 3), "action": torch.ones(5, 1)}, [5])
        >>> td["next", "observation"] = torch.ones(5, 3)
        >>> head(td)["next", "reward"].flatten()
        tensor([-1.1000, -1.1000, -1.1000, -1.1000, -1.1000])
    """

    def __init__(
        self,
        function: Callable[..., torch.Tensor],
        observations: Sequence[Entry],
        actions: Sequence[Entry],
        out: Entry,
    ) -> None:
        if not callable(function):
            raise TypeError(
                f"The function for {out.key!r} must be callable as function(observation, action, "
                f"next_observation), got {type(function).__name__}."
            )
        before = [entry.key for entry in observations]
        super().__init__(
            _Function(function, tuple(observations), tuple(actions), out),
            [
                *before,
                *(entry.key for entry in actions),
                *(join("next", k) for k in before),
            ],
            [join("next", out.key)],
        )


class _Function(nn.Module):
    """A user's function, with its arguments put together and its result checked."""

    def __init__(
        self,
        function: Callable[..., torch.Tensor],
        observations: tuple[Entry, ...],
        actions: tuple[Entry, ...],
        out: Entry,
    ) -> None:
        super().__init__()
        self.function, self.out = function, out
        self.observations, self.actions = observations, actions

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        n, m = len(self.observations), len(self.actions)
        parts = (
            (self.observations, values[:n]),
            (self.actions, values[n : n + m]),
            (self.observations, values[n + m :]),
        )
        arguments = [
            given[0] if len(given) == 1 else {e.key: v for e, v in zip(entries, given)}
            for entries, given in parts
        ]
        value = self.function(*arguments)
        first = values[0]
        lead = first.shape[: first.ndim - len(self.observations[0].shape)]
        return self._checked(value, lead)

    def _checked(self, value: torch.Tensor, lead: torch.Size) -> torch.Tensor:
        """Return the function's result as the entry, ``[*lead, *shape]``."""
        out = self.out
        name = getattr(self.function, "__name__", type(self.function).__name__)
        shape = (*lead, *out.shape)
        if isinstance(value, torch.Tensor) and tuple(value.shape) == tuple(lead):
            value = value.reshape((*lead, *(1 for _ in out.shape)))
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape:
            got = (
                f"the shape {tuple(value.shape)}"
                if isinstance(value, torch.Tensor)
                else type(value).__name__
            )
            raise ValueError(
                f"{name} must give {out.key!r} of the shape {tuple(lead)} or {shape}, one for "
                f"each row, and gave {got}."
            )
        if (value.dtype is torch.bool) != (out.dtype is torch.bool):
            raise ValueError(
                f"{name} must give {out.key!r} as {out.dtype}, and gave {value.dtype}."
            )
        return value.to(out.dtype)


def _shaped(value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return ``[*B, D]`` as ``[*B, *shape]``."""
    if value.shape[-1] != prod(shape):
        raise ValueError(
            f"The network of a head of the shape {shape} must write {prod(shape)} numbers, and "
            f"writes {value.shape[-1]}."
        )
    return value if len(shape) == 1 else value.reshape((*value.shape[:-1], *shape))
