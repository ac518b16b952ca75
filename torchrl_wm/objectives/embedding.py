"""Terms of joint embeddings: what keeps them from collapsing, and a probe that looks into them."""

from __future__ import annotations

from abc import abstractmethod

import torch
from tensordict import NestedKey, TensorDictBase

from torchrl_wm.modules import WorldModel
from torchrl_wm.modules.keys import join, unique
from torchrl_wm.modules.world_model.wiring import written_keys
from torchrl_wm.objectives.comparisons import (
    check_encoded,
    next_observations,
    read_label,
    Scale,
)
from torchrl_wm.objectives.keys import LossKeys
from torchrl_wm.objectives.processes import Processes
from torchrl_wm.objectives.terms import LossTerm, ReconstructionTerm


class _EmbeddingTerm(LossTerm):
    """A statistic of the encodings of a batch's next observations, one number for the batch.

    They are those that the loss ``"latent"`` takes for targets, and encoded once for both.
    """

    needs_prediction = False
    per_sample = False

    def __init__(
        self, name: str, weight: float, keys: NestedKey | list[NestedKey] | None
    ) -> None:
        super().__init__(name, weight)
        if keys is not None:
            keys = unique(keys if isinstance(keys, list) else [keys])
        self.keys = keys

    def check(self, world_model: WorldModel) -> None:
        super().check(world_model)
        encoded = self._embeddings(world_model)
        use = "spreads the encoder's outputs"
        advice = f" Name what it writes: {type(self).__name__}(keys=[...])."
        wanted = world_model.latent_keys if not encoded else encoded
        check_encoded(self.name, use, wanted, world_model, advice)

    def _embeddings(self, world_model: WorldModel) -> list[NestedKey]:
        """Return the entries that are spread: those given, else the latents that are encoded."""
        if self.keys is not None:
            return self.keys
        encoded = written_keys(world_model.encoder)
        return [key for key in world_model.latent_keys if key in encoded]

    def labels(self, world_model: WorldModel, keys: LossKeys) -> list[NestedKey]:
        return next_observations(world_model)

    def __call__(self, predicted, batch, loss):
        encoded = loss.encode_next(batch, gradient=True)
        rows = batch.numel()
        parts = [
            encoded.get(key).reshape(rows, -1)
            for key in self._embeddings(loss.world_model)
        ]
        valid = loss.valid(batch)
        valid = None if valid is None else valid.reshape(rows)
        joined = torch.cat(parts, -1)
        # Statistics in half precision are too coarse.
        with torch.autocast(joined.device.type, enabled=False):
            return self.statistic(_Rows(joined, valid, loss.processes))

    @abstractmethod
    def statistic(self, rows: _Rows) -> torch.Tensor:
        """Return the loss of embeddings, a scalar."""


class _Rows:
    """The valid embeddings of all processes, of which each holds some.

    Args:
        values: the embeddings of this process, ``[N, D]``; zero where they are not valid.
        valid: which of them are valid, ``[N]``; None for all.
        processes: the processes that train the loss.
    """

    def __init__(
        self, values: torch.Tensor, valid: torch.Tensor | None, processes: Processes
    ) -> None:
        dtype = torch.promote_types(values.dtype, torch.float32)
        self.values, self.processes = values.to(dtype), processes
        if valid is None:
            count = self.values.new_full((), len(values))
        else:
            count = valid.sum().to(dtype)
        #: The number of valid rows.
        self.count = processes.gather(count).sum()
        # Processes average their gradients: each divides by their average number of rows.
        share = processes.average(count).clamp_min(1).reciprocal()
        self.weights = share.expand(len(values)) if valid is None else valid * share

    def mean(self, statistic: torch.Tensor) -> torch.Tensor:
        """Return the mean of ``[*S, N, D]`` over the valid rows of all processes, ``[*S, D]``.

        Its gradient is that of this process's rows: averaged over the processes, it is the whole.
        """
        return self._whole(self.weights @ statistic)

    def covariance(self) -> torch.Tensor:
        """Return the unbiased covariance, ``[D, D]``."""
        # No gradient is lost with the mean's: deviations from it add up to zero.
        off = self.values - self.mean(self.values).detach()
        spread = self._whole((off * self.weights.unsqueeze(-1)).mT @ off)
        return spread * (self.count / (self.count - 1).clamp_min(1))

    def _whole(self, part: torch.Tensor) -> torch.Tensor:
        if not self.processes.groups:
            return part
        return self.processes.average(part) + (part - part.detach())


class SIGRegTerm(_EmbeddingTerm):
    """Distance of the embeddings' distribution from a standard Gaussian: SIGReg.

    LeJEPA's regulariser (arXiv 2511.08544) keeps a joint embedding from collapsing: the
    encodings of the next observations should be distributed as ``N(0, I)``. They are projected
    onto random directions, drawn anew in each call. Along each direction the Epps-Pulley
    statistic compares their characteristic function with the Gaussian's,

    ``n * integral |mean_i exp(j t x_i) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt``,

    over ``|t| <= 3`` by the trapezoidal rule. The term is its mean over the directions. For
    Gaussian samples its expectation does not depend on their number ``n``; for others it grows
    with it: a batch of ``[B, T]`` has ``n = B * T`` samples. Train both sides of the prediction,
    ``LatentTerm(stop_gradient=False)``.

    Args:
        weight: the factor of the term; LeWorldModel (arXiv 2603.19312) has 0.09.
        projections: the number of directions.
        knots: the number of points of the rule in ``[0, 3]``.
        keys: the output of the encoder that is spread, or a list of outputs, jointly; by default
            the latents among them.
        name: the loss appears as ``loss_<name>``.

    Raises:
        ValueError: if there are less than 1 direction or 2 knots, or if the encoder does not
            write ``keys``.

    Examples:
        >>> import torch
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from torchrl.modules import MLP
        >>> from torchrl_wm import WorldModel, WorldModelLoss
        >>> from torchrl_wm.objectives import LatentTerm, SIGRegTerm
        >>> world_model = WorldModel(
        ...     Mod(MLP(3, 4, num_cells=[8]), ["observation"], ["latent"]),
        ...     Mod(MLP(5, 4, num_cells=[8]), ["latent", "action"], [("next", "latent")]),
        ... )
        >>> loss = WorldModelLoss(
        ...     world_model, losses=[LatentTerm(stop_gradient=False), SIGRegTerm()]
        ... )
        >>> loss.out_keys
        ['loss_latent', 'loss_sigreg']
    """

    def __init__(
        self,
        weight: float = 0.09,
        *,
        projections: int = 1024,
        knots: int = 17,
        keys: NestedKey | list[NestedKey] | None = None,
        name: str = "sigreg",
    ) -> None:
        super().__init__(name, weight, keys)
        if projections < 1 or knots < 2:
            raise ValueError(
                f"SIGReg needs at least 1 projection and 2 knots, got projections={projections} "
                f"and knots={knots}."
            )
        self.projections, self.knots = projections, knots

    def statistic(self, rows: _Rows) -> torch.Tensor:
        values = rows.values
        drawn = torch.randn(
            values.shape[-1], self.projections, dtype=values.dtype, device=values.device
        )
        # The same for all processes: an average of Gaussians has directions as random as theirs.
        drawn = rows.processes.average(drawn)
        along = values @ (drawn / drawn.norm(dim=0))  # [N, projections]
        # Both functions are 1 at 0.
        width = 3 / (self.knots - 1)
        t = width * torch.arange(1, self.knots, dtype=along.dtype, device=along.device)
        gaussian = torch.exp(-t.square() / 2)
        # Both halves of the integral; the last knot counts half.
        step = torch.full_like(t, 2 * width)
        step[-1] /= 2
        angle = t[:, None, None] * along  # [knots - 1, N, projections]
        real, imaginary = rows.mean(angle.cos()), rows.mean(angle.sin())
        off = (real - gaussian.unsqueeze(-1)).square() + imaginary.square()
        return rows.count * ((gaussian * step) @ off).mean()


class VICRegTerm(_EmbeddingTerm):
    """Variance and covariance of the embeddings: VICReg (arXiv 2105.04906).

    Keeps a joint embedding from collapsing, by two terms over the encodings of the next
    observations, ``[n, D]``:

    ``variance * mean_d max(0, 1 - sqrt(C_dd + 1e-4)) + covariance * sum_(d != e) C_de^2 / D``,

    where ``C`` is their covariance. The paper's invariance is the distance of predicted latents
    from encoded ones, ``LatentTerm(stop_gradient=False)``. Relative to its weight, the paper's
    weights are the defaults. A batch of one sample has no spread and no loss.

    Args:
        weight: the factor of the term.
        variance: the weight of the hinge that keeps each feature's standard deviation above 1.
        covariance: the weight of the squares of the covariances.
        keys, name: as those of :class:`SIGRegTerm`.

    Raises:
        ValueError: if a weight is negative or both are zero, or if the encoder does not write
            ``keys``.

    Examples:
        >>> from torchrl_wm.objectives import LatentTerm, VICRegTerm
        >>> losses = [LatentTerm(stop_gradient=False), VICRegTerm()]
    """

    def __init__(
        self,
        weight: float = 1.0,
        *,
        variance: float = 1.0,
        covariance: float = 0.04,
        keys: NestedKey | list[NestedKey] | None = None,
        name: str = "vicreg",
    ) -> None:
        super().__init__(name, weight, keys)
        if min(variance, covariance) < 0 or not variance + covariance:
            raise ValueError(
                f"VICReg needs weights that are not negative, and not both zero, got "
                f"variance={variance} and covariance={covariance}."
            )
        self.variance, self.covariance = variance, covariance

    def statistic(self, rows: _Rows) -> torch.Tensor:
        covariance = rows.covariance()
        variances = covariance.diagonal()
        hinge = (1 - (variances + 1e-4).sqrt()).relu().mean()
        others = covariance - variances.diag()
        loss = self.variance * hinge
        loss = loss + self.covariance * others.square().sum() / len(others)
        return torch.where(rows.count > 1, loss, torch.zeros_like(loss))


class ProbeTerm(ReconstructionTerm):
    """Distance of observations that are decoded from detached latents: a probe.

    It trains the decoder and nothing else, so that one may look at latents that are not made
    to be decoded. The decoder learns from the encodings of the next observations.

    Args:
        distance: ``"l2"``, ``"l1"``, ``"smooth_l1"`` or ``"symlog"``.
        weight: the factor of the term.
        scale: see :class:`ReconstructionTerm`.
        name: the loss appears as ``loss_<name>``.

    Raises:
        ValueError: if the model has no decoder, or if its decoder reads what the encoder does
            not write.
    """

    needs_prediction = False

    def __init__(
        self,
        distance: str = "l2",
        weight: float = 1.0,
        scale: Scale | None = None,
        name: str = "probe",
    ) -> None:
        super().__init__(distance, weight, "next", scale)
        self.name = name

    def check(self, world_model: WorldModel) -> None:
        super().check(world_model)
        reads = unique(world_model.decoder.in_keys)
        use = "lets the decoder read encodings"
        check_encoded(self.name, use, reads, world_model)

    def __call__(self, predicted, batch, loss):
        latents: TensorDictBase = loss.encode_next(batch).detach()
        decoded, total = loss.world_model.decode(latents), 0.0
        for key, observation in self.pairs(loss.world_model, loss.tensor_keys):
            place = join("next", observation)
            label = read_label(batch, place, self.name)
            total = total + self.compare(decoded.get(key), label, place, batch)
        return total
