"""Ensemble dynamics: from the members' Gaussians to one next state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from torchrl_wm.modules.blocks.ensemble import GaussianEnsemble
from torchrl_wm.modules.blocks.entries import Entry, JoinEntries, SplitEntries
from torchrl_wm.modules.blocks.normalizer import Normalizer, valid_rows
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import join, leaf_keys, sibling

#: How an ensemble calls the spread of its members' means.
DISAGREEMENT = "disagreement"
#: What it writes of its own doubts.
DOUBTS = (("next", DISAGREEMENT), ("next", "deviation"))

Propagation = Literal["ts1", "tsinf", "expectation", "mean"]
PROPAGATIONS: tuple[str, ...] = ("ts1", "tsinf", "expectation", "mean")


class EnsembleDynamics(TensorDictModule):
    """A probabilistic ensemble as the dynamics of a world model (PETS, MBPO).

    The members predict the change of the latents (or the latents themselves)
    and, with ``reward``, the reward, each as a Gaussian. ``propagation`` says how one next
    state is made of them (PETS, arXiv 1805.12114, section 5):

    - ``"ts1"``: sampled from a member drawn anew for each row and step.
    - ``"tsinf"``: sampled from the member that the row follows, which stands
      under ``member`` at the root (``[*B]`` int64) and stays over a rollout.
    - ``"expectation"``: sampled from the Gaussian of the members' average mean
      and average variance.
    - ``"mean"``: the members' average mean, without noise.

    Members are drawn from, and averaged over, the :attr:`elites`. The loss trains
    all of them on ``("next", "loc")`` and ``("next", "log_var")``.

    ====================================  ==================  ========================
    reads                                 shape
    ====================================  ==================  ========================
    latents, actions                      by their entries
    ``member``                            ``[*B]`` int64      with ``"tsinf"`` only
    ====================================  ==================  ========================

    ====================================  ==================  ========================
    writes                                shape
    ====================================  ==================  ========================
    ``("next", latent)``                  by its entry
    ``("next", "ensemble_reward")``       as the reward       with ``reward``; beside it
    ``("next", "loc")``                   ``[*B, E, D]``      the members' means
    ``("next", "log_var")``               ``[*B, E, D]``      and log-variances
    ``("next", "disagreement")``          ``[*B, 1]``         spread of the means
    ``("next", "deviation")``             ``[*B, 1]``         with ``deviation``
    ====================================  ==================  ========================

    ``D`` is the size of all latents and the reward, joined in this order; means
    and variances are those of the *next* latents, in the units of the data.
    (Members come after the batch dims, so that the entries fit a tensordict of
    batch size ``[*B]``.) The disagreement is the standard deviation of the
    members' means, in units of the targets' own spread, as the root mean square
    over ``D``, where targets that never changed count zero. One member has none: zero.
    The deviation is the largest norm over ``D`` of a member's predicted standard deviation, in
    the same units (MOPO, arXiv 2005.13239).

    Args:
        ensemble: maps the joined latents and actions to ``D`` Gaussians.
        latents: the latents, of float dtypes.
        actions: the actions.

    Keyword Args:
        reward: the reward, if the members predict it, too.
        target: ``"delta"``, the members predict the change of the latents, or
            ``"absolute"``, the next latents.
        propagation: see above.
        elites: how many of the members make predictions; all by default. They are the
            first ones until :meth:`choose_elites`.
        normalize: whether inputs and targets are normalised.
        member_key: the key of the member that a row follows.
        all_members: whether all members are written, under "loc", "log_var" and
            "disagreement". Without, ``"ts1"`` runs each row only through the member that
            it draws, which is ``E`` times less work; the members then share
            the rows of a batch equally.
        deviation: whether "deviation" is written beside the disagreement.

    Raises:
        ValueError: if the ensemble's sizes are not those of the entries, or an
            option is unknown.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Unbounded
        >>> from torchrl_wm.modules import EnsembleDynamics, Entry, GaussianEnsemble
        >>> observation = Entry.from_spec("observation", Unbounded((3,)))
        >>> action = Entry.from_spec("action", Unbounded((1,)))
        >>> dynamics = EnsembleDynamics(
        ...     GaussianEnsemble(5, 4, 3, hidden=(32, 32)), [observation], [action],
        ...     propagation="mean", normalize=False,
        ... )
        >>> td = TensorDict({"observation": torch.zeros(7, 3), "action": torch.zeros(7, 1)}, [7])
        >>> out = dynamics(td)["next"]
        >>> out["observation"].shape, out["loc"].shape, out["disagreement"].shape
        (torch.Size([7, 3]), torch.Size([7, 5, 3]), torch.Size([7, 1]))
    """

    def __init__(
        self,
        ensemble: GaussianEnsemble,
        latents: Sequence[Entry],
        actions: Sequence[Entry],
        *,
        reward: Entry | None = None,
        target: Literal["delta", "absolute"] = "delta",
        propagation: Propagation = "ts1",
        elites: int | None = None,
        normalize: bool = True,
        member_key: NestedKey = "member",
        all_members: bool = True,
        deviation: bool = False,
    ) -> None:
        step = _EnsembleStep(
            ensemble, latents, actions, reward, target, elites, normalize
        )
        self._wire(step, propagation, member_key, all_members, deviation)

    def _wire(
        self,
        step: _EnsembleStep,
        propagation: Propagation,
        member_key: NestedKey,
        all_members: bool,
        deviation: bool,
    ) -> None:
        if propagation not in PROPAGATIONS:
            raise ValueError(
                f"Unknown propagation {propagation!r}. Valid choices are {list(PROPAGATIONS)}."
            )
        reads = [entry.key for entry in (*step.latents, *step.actions)]
        if propagation == "tsinf":
            reads.append(member_key)
        writes = [join("next", entry.key) for entry in step.latents]
        if step.reward is not None:
            writes.append(join("next", sibling(step.reward.key, "ensemble_reward")))
        if all_members:
            writes += [("next", "loc"), ("next", "log_var"), ("next", "disagreement")]
            writes += [("next", "deviation")] if deviation else []
        propagate = _Propagate(step, propagation, all_members, deviation)
        super().__init__(propagate, reads, writes)
        self.propagation, self.member_key = propagation, member_key
        self.all_members, self.deviation = all_members, deviation

    @property
    def ensemble(self) -> GaussianEnsemble:
        """The members."""
        return self._step.ensemble

    @property
    def elites(self) -> torch.Tensor:
        """The numbers of the members that make predictions, ``[n]`` int64."""
        return self._step.elites

    @property
    def targets(self) -> list[NestedKey]:
        """The entries below "next" that the members predict, in the order of ``D``."""
        rewards = [] if self._step.reward is None else [self._step.reward]
        return [entry.key for entry in (*self._step.latents, *rewards)]

    @property
    def _step(self) -> _EnsembleStep:
        return self.module.step

    def with_propagation(
        self,
        propagation: Propagation,
        *,
        all_members: bool = True,
        deviation: bool | None = None,
    ) -> EnsembleDynamics:
        """Return the same members, propagated otherwise; parameters and buffers are shared.

        Whether they write "deviation" stays as it is, unless it is given.
        """
        deviation = self.deviation if deviation is None else deviation
        other = type(self).__new__(type(self))
        other._wire(self._step, propagation, self.member_key, all_members, deviation)
        return other.train(self.training)

    # Data ----------------------------------------------------------------

    @torch.no_grad()
    def fit_normalizers(self, batch: TensorDictBase) -> None:
        """Fit the normalisers of inputs and targets to real transitions, ``[*B]``.

        Raises:
            KeyError: if latents, actions or targets are missing.
        """
        step, batch = self._step, valid_rows(batch)
        if step.inputs is None:
            return
        step.inputs.fit(self._inputs(batch))
        step.outputs.fit(self._targets(batch))

    @torch.no_grad()
    def member_errors(self, batch: TensorDictBase) -> torch.Tensor:
        """Return the mean squared error of each member on real transitions, ``[E]``.

        It is in units of the targets' spread, so that no entry outweighs the others. Targets
        that never changed count zero.

        Args:
            batch: transitions ``[*B]`` that were held out of training. Rows that
                ``("collector", "mask")`` calls invalid are left out.
        """
        step, batch = self._step, valid_rows(batch)
        loc, _ = step.predict(self._inputs(batch))
        target = step.normalized(self._targets(batch))
        return step.live((loc - target).pow(2)).flatten(1).mean(1)

    def choose_elites(self, batch: TensorDictBase) -> torch.Tensor:
        """Make the members of the least held-out error the elites (MBPO, arXiv 1906.08253).

        Args:
            batch: transitions ``[*B]`` that were held out of training.

        Returns:
            :meth:`member_errors`, ``[E]``.
        """
        errors = self.member_errors(batch)
        best = errors.argsort()[: len(self.elites)]
        self.elites.copy_(best.sort().values)
        return errors

    def _inputs(self, batch: TensorDictBase) -> torch.Tensor:
        """Return latents and actions, joined, ``[*B, S + A]``."""
        entries = (*self._step.latents, *self._step.actions)
        return self._step.join_inputs(*(_get(batch, entry.key) for entry in entries))

    def _targets(self, batch: TensorDictBase) -> torch.Tensor:
        """Return the targets that the members learn to predict, ``[*B, D]``."""
        values = [_get(batch, join("next", key)) for key in self.targets]
        if self._step.delta:
            # In the entries' own dtype: the joined vector may keep less of large numbers.
            for number, entry in enumerate(self._step.latents):
                values[number] = values[number] - _get(batch, entry.key)
        return self._step.join_targets(*values)


class _EnsembleStep(nn.Module):
    """The members between normalisers, which all propagations share."""

    def __init__(
        self,
        ensemble: GaussianEnsemble,
        latents: Sequence[Entry],
        actions: Sequence[Entry],
        reward: Entry | None,
        target: str,
        elites: int | None,
        normalize: bool,
    ) -> None:
        super().__init__()
        if target not in ("delta", "absolute"):
            raise ValueError(
                f"Unknown target {target!r}. Valid choices are ['delta', 'absolute']."
            )
        self.latents, self.actions, self.reward = tuple(latents), tuple(actions), reward
        self.delta = target == "delta"
        outputs = [*self.latents, *([] if reward is None else [reward])]
        self.join_inputs = JoinEntries([*self.latents, *self.actions])
        self.join_targets = JoinEntries(outputs)
        # Small changes of large float64 numbers would be lost in a narrower dtype.
        dtype = self.join_inputs.dtype
        for entry in self.latents:
            dtype = torch.promote_types(dtype, entry.dtype)
        self.join_state = JoinEntries(self.latents, dtype=dtype)
        self.split = SplitEntries(outputs)
        self.state_size = sum(entry.size for entry in self.latents)
        self.ensemble = ensemble
        sizes = {
            "in_features": (
                ensemble.network.in_features,
                self.join_inputs.out_features,
            ),
            "out_features": (ensemble.out_features, self.split.in_features),
        }
        for name, (has, needs) in sizes.items():
            if has != needs:
                raise ValueError(
                    f"The ensemble has {name}={has}; the latents {_names(latents)}, actions "
                    f"{_names(actions)} and reward {reward and reward.name} ask for {needs}."
                )
        members = ensemble.members
        count = members if elites is None else elites
        if not 1 <= count <= members:
            raise ValueError(
                f"elites must be between 1 and the {members} members, got {elites}."
            )
        self.register_buffer("elites", torch.arange(count))
        self.inputs = Normalizer(self.join_inputs.out_features) if normalize else None
        # A reward that was always 1 is predicted as 1 in states without data, too.
        features = self.split.in_features
        self.outputs = Normalizer(features, freeze_constant=True) if normalize else None

    def join(self, values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the latents, ``[*B, S]``, and both latents and actions, ``[*B, S + A]``."""
        joined = self.join_inputs(*values)
        if self.join_state.dtype == joined.dtype:
            return joined[..., : self.state_size], joined
        return self.join_state(*values[: len(self.latents)]), joined

    def predict(self, joined: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the members' normalised targets: ``(loc, log_var)``, ``[E, *B, D]``."""
        return self.ensemble(joined if self.inputs is None else self.inputs(joined))

    def base(self, state: torch.Tensor) -> torch.Tensor:
        """Return the values to which predicted targets are added, ``[*B, D]``."""
        # The reward is no change of anything.
        base = F.pad(state, (0, self.split.in_features - self.state_size))
        return base if self.delta else torch.zeros_like(base)

    def normalized(self, target: torch.Tensor) -> torch.Tensor:
        """Return targets in units of their spread."""
        return target if self.outputs is None else self.outputs(target)

    def denormalized(self, target: torch.Tensor) -> torch.Tensor:
        """Return normalised targets in the units of the data."""
        return target if self.outputs is None else self.outputs.inverse(target)

    def live(self, value: torch.Tensor) -> torch.Tensor:
        """Return ``value``, ``[..., D]``, with zeros where the targets never changed.

        All members predict the same there: nothing trains the outputs of their networks.
        """
        return value if self.outputs is None else value * (self.outputs.std > 0)

    def log_scale(self) -> torch.Tensor | float:
        """Return what a normalised log-variance lacks to be that of the data."""
        return 0.0 if self.outputs is None else 2 * self.outputs.scale.log()


class _Propagate(nn.Module):
    """One step of the ensemble, by one way of propagating."""

    def __init__(
        self,
        step: _EnsembleStep,
        propagation: Propagation,
        all_members: bool,
        deviation: bool,
    ) -> None:
        super().__init__()
        self.step, self.propagation = step, propagation
        self.all_members, self.deviation = all_members, deviation

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        step, member = self.step, None
        if self.propagation == "tsinf":
            *values, member = values
        state, joined = step.join(values)
        base = step.base(state)
        if self.propagation == "ts1" and not self.all_members:
            return self._entries(base, self._by_own_member(joined))
        loc, log_var = step.predict(joined)  # [E, *B, D]
        entries = self._entries(base, self._choose(loc, log_var, member))
        if not self.all_members:
            return entries
        spread = step.live(loc.var(0, unbiased=False)).mean(-1, keepdim=True)
        # The root of zero has no finite gradient.
        disagreement = spread.clamp_min(torch.finfo(spread.dtype).tiny).sqrt()
        disagreement = torch.where(spread > 0, disagreement, 0.0)
        entries = (
            *entries,
            (base + step.denormalized(loc)).movedim(0, -2),
            (log_var + step.log_scale()).movedim(0, -2),
            disagreement,
        )
        if not self.deviation:
            return entries
        std = step.live((log_var / 2).exp())
        return (*entries, torch.linalg.vector_norm(std, dim=-1, keepdim=True).amax(0))

    def _entries(
        self, base: torch.Tensor, chosen: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return the next entries, given normalised targets ``[*B, D]``."""
        entries = self.step.split(base + self.step.denormalized(chosen))
        return entries if isinstance(entries, tuple) else (entries,)

    def _by_own_member(self, joined: torch.Tensor) -> torch.Tensor:
        """Return a target ``[*B, D]``; each row runs only through a member drawn anew."""
        step = self.step
        given = joined if step.inputs is None else step.inputs(joined)
        everyone = len(step.elites) == step.ensemble.members
        loc, log_var = step.ensemble.drawn(given, None if everyone else step.elites)
        return loc + (log_var / 2).exp() * torch.randn_like(loc)

    def _choose(
        self, loc: torch.Tensor, log_var: torch.Tensor, member: torch.Tensor | None
    ) -> torch.Tensor:
        """Return a target ``[*B, D]`` from the members' Gaussians ``[E, *B, D]``."""
        elites, lead = self.step.elites, loc.shape[1:-1]
        if self.propagation == "ts1":
            drawn = torch.randint(len(elites), lead, device=loc.device)
            # Not elites[drawn]: without batch dims torch 2.13 does not compile that.
            member = elites.index_select(0, drawn.flatten()).reshape(lead)
        if member is not None:
            loc, log_var = _of_member(loc, member), _of_member(log_var, member)
            std = (log_var / 2).exp()
        else:
            if len(elites) < len(loc):
                loc, log_var = loc[elites], log_var[elites]
            loc = loc.mean(0)
            if self.propagation == "mean":
                return loc
            std = log_var.exp().mean(0).sqrt()
        return loc + std * torch.randn_like(loc)


def _of_member(value: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
    """Return the values of each row's member, ``[*B, D]``, from ``[E, *B, D]``."""
    if member.dtype is not torch.int64 or member.shape != value.shape[1:-1]:
        raise ValueError(
            f"'member' must be int64 of the batch shape {tuple(value.shape[1:-1])}, the number "
            f"of the member that each row follows; got {member.dtype} of the shape "
            f"{tuple(member.shape)}."
        )
    index = member[None, ..., None].expand(1, *value.shape[1:])
    return value.gather(0, index)[0]


def _get(batch: TensorDictBase, key: NestedKey) -> torch.Tensor:
    """Return an entry of real transitions."""
    value = batch.get(key, None)
    if value is None:
        raise MissingEntryError(
            f"The ensemble needs {key!r}, and the batch has {leaf_keys(batch)}."
        )
    return value


def _names(entries: Sequence[Entry]) -> list[str]:
    return [entry.name for entry in entries]
