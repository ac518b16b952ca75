"""Inputs and targets of networks, shifted and scaled by the statistics of data."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn

from torchrl_wm import _upstream
from torchrl_wm.modules.blocks.entries import Entry, JoinEntries, SplitEntries
from torchrl_wm.modules.blocks.precision import coarse_dims, EPS, warn_of_coarse
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import is_next, join, leaf_keys, missing_from, unique
from torchrl_wm.modules.modes import evaluation_mode
from torchrl_wm.modules.world_model.world_model import WorldModel

#: A spread this small, relative to the mean, is rounding: the dimension is constant.
_CONSTANT = EPS
#: The same for numbers in double precision.
_CONSTANT_DOUBLE = 1e-12
#: So is a spread this small by itself, such as that of numbers that are zero but for rounding.
_ROUNDING = 1e-12


class _Notice:
    """A record of the warnings that were given, shared by the normalisers of a model.

    Attributes:
        given: whether they warned that one is not fitted.
        coarse: the entries whose numbers they called too large.
    """

    given = False

    def __init__(self) -> None:
        self.coarse: set[NestedKey] = set()


class Normalizer(nn.Module):
    """A map that gives each feature mean 0 and standard deviation 1, as fitted to data.

    Mean and standard deviation are buffers: they are saved, move with the model
    and are not trained. Until :meth:`fit` is called it is the identity, and the
    first use warns; the normalisers of a ready-made model warn once together. A
    feature that is constant in the data is shifted and not scaled.

    Args:
        features: the number of features ``F``.
        freeze_constant: for targets: a feature that never changed in the data is predicted
            to stay, as :meth:`inverse` returns it as it was for any input.

    Examples:
        >>> import torch
        >>> from torchrl_wm.modules import Normalizer
        >>> data = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
        >>> normalizer = Normalizer(2).fit(data)
        >>> normalizer(data)
        tensor([[-1.,  0.],
                [ 1.,  0.]])
        >>> normalizer.inverse(normalizer(data))
        tensor([[1., 5.],
                [3., 5.]])
    """

    def __init__(self, features: int, *, freeze_constant: bool = False) -> None:
        _upstream.check_replaced(nn.Module)
        super().__init__()
        self.freeze_constant = freeze_constant
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self._is_fitted = False  # what `fitted` says, without waiting for the device
        self._notice = _Notice()

    @property
    def features(self) -> int:
        """The number of features ``F``."""
        return self.mean.shape[-1]

    @torch.no_grad()
    def fit(self, data: torch.Tensor) -> Normalizer:
        """Take mean and standard deviation from ``data``, in place of those before.

        Args:
            data: ``[*B, F]``, all of it valid.

        Returns:
            The normaliser itself.

        Raises:
            ValueError: if the data has another number of features, no rows, or
                values that are not finite.
        """
        if data.ndim < 1 or data.shape[-1] != self.features or not data.numel():
            raise ValueError(
                f"The normaliser has {self.features} features, and was to be fitted to data of "
                f"the shape {tuple(data.shape)}. Give [*B, {self.features}] with at least one row."
            )
        rows = data.reshape(-1, self.features).double()
        bad = (~rows.isfinite()).any(0).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"The normaliser cannot be fitted: the features {bad} hold NaN or infinite "
                f"values. Mask padding out, or look at what the env recorded."
            )
        mean, std = rows.mean(0), rows.std(0, unbiased=False)
        double = data.dtype is self.mean.dtype is torch.float64
        share = _CONSTANT_DOUBLE if double else _CONSTANT
        # A spread above 1 is never left to the networks: scaling does not blow it up.
        least = (share * mean.abs()).clamp(_ROUNDING, 1.0)
        constant = std <= least
        self.mean.copy_(mean)
        self.std.copy_(std.masked_fill(constant, 0.0 if self.freeze_constant else 1.0))
        self.fitted.fill_(True)
        self._is_fitted = True
        return self

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Map ``[*B, F]`` in the units of the data to mean 0 and standard deviation 1."""
        self._warn_if_unfitted()
        return (value - self.mean) / self.scale

    @property
    def scale(self) -> torch.Tensor:
        """The numbers that features are divided by, ``[F]``: the standard deviation, or 1."""
        if not self.freeze_constant:
            return self.std
        return torch.where(self.std > 0, self.std, 1.0)

    def inverse(self, value: torch.Tensor) -> torch.Tensor:
        """Undo :meth:`forward`."""
        self._warn_if_unfitted()
        return value * self.std + self.mean

    def _warn_if_unfitted(self) -> None:
        """Warn at the first use before :meth:`fit`."""
        if self._is_fitted or self._notice.given or torch.compiler.is_compiling():
            return
        self._is_fitted = self._came_fitted()
        if self._is_fitted:
            return
        self._notice.given = True
        # Without a registry: Python would show it once a process, as all models come to this line.
        warnings.warn_explicit(
            "A normaliser is used before it is fitted, and is the identity. Call "
            "torchrl_wm.modules.fit_normalizers(world_model, batch) with real transitions "
            "first.",
            UserWarning,
            *_caller(),
        )

    def _came_fitted(self) -> bool:
        """Return whether the statistics are those of data, for example loaded ones."""
        try:
            return bool(self.fitted)
        except RuntimeError:  # no single value: on the meta device, or under vmap
            return False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._is_fitted = bool(self.fitted)

    def extra_repr(self) -> str:
        return f"{self.features}, fitted={self._is_fitted}"


def _caller() -> tuple[str, int]:
    """Return the file and the line that called a normaliser, for a warning."""
    frame = inspect.currentframe()
    for _ in range(3):
        frame = frame.f_back or frame
    return frame.f_code.co_filename, frame.f_lineno


def share_notice(model: nn.Module) -> None:
    """Let the normalisers of a model warn once together: they are fitted together."""
    notice = _Notice()
    for normalizer in _normalizers(model):
        normalizer._notice = notice


@contextmanager
def without_warnings(model: nn.Module) -> Iterator[None]:
    """Silence the warnings of unfitted normalisers, while a model is only looked at."""
    notices = [normalizer._notice for normalizer in _normalizers(model)]
    before = [notice.given for notice in notices]
    try:
        for notice in notices:
            notice.given = True
        yield
    finally:
        for notice, given in zip(notices, before):
            notice.given = given


def _normalizers(model: nn.Module) -> list[Normalizer]:
    return [module for module in model.modules() if isinstance(module, Normalizer)]


class NormalizedNetwork(nn.Module):
    """A network that reads entries: joined into one vector, and normalised.

    Args:
        entries: the entries that it reads, in the order of its inputs.
        network: maps ``[*B, n]`` to its outputs, ``n`` being the joined entries' size.
        normalize: whether to normalise.

    Examples:
        >>> import torch
        >>> from torchrl.data import Categorical, Unbounded
        >>> from torchrl_wm.modules import Entry, NormalizedNetwork
        >>> entries = [
        ...     Entry.from_spec("observation", Unbounded((2,))),
        ...     Entry.from_spec("action", Categorical(3)),
        ... ]
        >>> network = NormalizedNetwork(entries, torch.nn.Linear(5, 4))
        >>> observation, action = torch.randn(10, 2), torch.randint(3, (10,))
        >>> network.fit_normalizer(observation, action)
        >>> network(observation, action).shape
        torch.Size([10, 4])
    """

    def __init__(
        self, entries: Sequence[Entry], network: nn.Module, *, normalize: bool = True
    ) -> None:
        super().__init__()
        self.join = JoinEntries(entries)
        self.normalizer = Normalizer(self.join.out_features) if normalize else None
        self.network = network

    def forward(self, *values: torch.Tensor) -> Any:
        """Run the network on the entries, one tensor ``[*B, *feature]`` for each."""
        vector = self.join(*values)
        if self.normalizer is not None:
            vector = self.normalizer(vector)
        return self.network(vector)

    def fit_normalizer(self, *values: torch.Tensor) -> None:
        """Fit the normaliser to the entries, ``[*B, *feature]`` each."""
        if self.normalizer is not None:
            self.normalizer.fit(self.join(*values))


class DenormalizedNetwork(nn.Module):
    """A network that predicts entries of any scale, from outputs near 0 and 1.

    Args:
        network: maps its inputs to ``[*B, n]``, ``n`` being the entries' size.
        entries: the entries that it predicts, of float dtypes.
        normalize: whether the outputs are scaled by the statistics of the data.

    Examples:
        >>> import torch
        >>> from torchrl.data import Unbounded
        >>> from torchrl_wm.modules import DenormalizedNetwork, Entry
        >>> reward = Entry.from_spec("reward", Unbounded((1,)))
        >>> network = DenormalizedNetwork(torch.nn.Linear(4, 1), [reward])
        >>> network.fit_output_normalizer(1000 + torch.randn(100, 1))
        >>> bool((network(torch.randn(5, 4)) - 1000).abs().max() < 10)
        True
    """

    def __init__(
        self, network: nn.Module, entries: Sequence[Entry], *, normalize: bool = True
    ) -> None:
        super().__init__()
        self.network = network
        self.join, self.split = JoinEntries(entries), SplitEntries(entries)
        self.normalizer = Normalizer(self.split.in_features) if normalize else None

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Predict the entries, ``[*B, *feature]`` each; a single one as itself."""
        vector = self.network(*inputs)
        if self.normalizer is not None:
            vector = self.normalizer.inverse(vector)
        return self.split(vector)

    def fit_output_normalizer(self, *values: torch.Tensor) -> None:
        """Fit the normaliser to the entries, ``[*B, *feature]`` each."""
        if self.normalizer is not None:
            self.normalizer.fit(self.join(*values))

    def scale(self, key: NestedKey) -> torch.Tensor | float:
        """Return an entry's standard deviation, in its feature shape: the unit of its errors."""
        if self.normalizer is None:
            return 1.0
        std = self.split(self.normalizer.std)
        std = std if isinstance(std, tuple) else (std,)
        keys = [entry.key for entry in self.split.entries]
        return std[keys.index(unique([key])[0])]


@torch.no_grad()
def fit_normalizers(model: nn.Module, batch: TensorDictBase) -> None:
    """Fit all normalisers of a model to a batch of real transitions.

    Call it when there is data, before training, and again when the data has changed much.
    It fits networks that have a ``fit_normalizer`` (such as :class:`NormalizedNetwork`) to
    the entries that their module reads, those that have a ``fit_output_normalizer``
    (:class:`DenormalizedNetwork`) to the entries that it writes, and modules that fit
    themselves (:class:`EnsembleDynamics`), to the entries that they read or, if they have them,
    to their ``normalizer_keys``. Latents that the batch lacks are encoded from
    its observations.

    A loss with ``delay_encoder=True`` follows: its target encoder normalises as the
    encoder does, whenever that was fitted.

    A warning names, once for a model, entries whose numbers are so large beside their changes
    that single precision holds little of these (seconds since 1970).

    Args:
        model: the world model, or a component of one.
        batch: real transitions, ``[*B]``, with "next". Rows that
            ``("collector", "mask")`` calls invalid are left out.

    Raises:
        KeyError: if the batch lacks an entry that a module reads.
        ValueError: if the data is not finite, or no row of it is valid.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm.models import make_ensemble_world_model
        >>> from torchrl_wm.modules import fit_normalizers
        >>> env = GymEnv("Pendulum-v1")
        >>> world_model, loss = make_ensemble_world_model(env, hidden=(32, 32))
        >>> fit_normalizers(world_model, env.rollout(100))
    """
    batch = valid_rows(batch)
    read: list[NestedKey] = []
    for module in model.modules():
        if not isinstance(module, TensorDictModuleBase):
            continue
        network = getattr(module, "module", None)
        if hasattr(module, "fit_normalizers"):
            keys = unique(getattr(module, "normalizer_keys", module.in_keys))
            module.fit_normalizers(_data(model, batch, keys))
            read += keys
        if hasattr(network, "fit_normalizer"):
            keys = unique(module.in_keys)
            read += keys
            data = _data(model, batch, keys)
            network.fit_normalizer(*(data.get(key) for key in keys))
        if hasattr(network, "fit_output_normalizer"):
            keys = unique(module.out_keys)
            data = _data(model, batch, keys)
            network.fit_output_normalizer(*(data.get(key) for key in keys))
    _check_precision(model, batch, unique(read))


def _check_precision(
    model: nn.Module, batch: TensorDictBase, keys: Sequence[NestedKey]
) -> None:
    """Warn, once, of entries that are too large for the normalisers' dtype."""
    normalizers = _normalizers(model)
    if not normalizers or normalizers[0].mean.dtype is torch.float64:
        return
    said, batch = normalizers[0]._notice.coarse, batch.reshape(-1)
    for key in keys:
        value = batch.get(key, None)
        if value is None or not value.is_floating_point() or key in said:
            continue
        following = batch.get(join("next", key), None)
        dims = coarse_dims(value, following)
        if dims:
            said.add(key)
            warn_of_coarse(key, dims, stacklevel=5)  # behind no_grad's frame


def with_statistics(
    target: TensorDictBase, parameters: TensorDictBase, module: nn.Module
) -> TensorDictBase:
    """Return target parameters with the present statistics of the normalisers in ``module``.

    Statistics are facts about the data, not learned: a target network that kept its
    first ones would read inputs in other units.

    Args:
        target: the delayed parameters and buffers of ``module``.
        parameters: its present ones.
        module: a network.

    Returns:
        ``target`` itself if there are no normalisers.
    """
    paths = [
        tuple(name.split(".")) if name else ()
        for name, part in module.named_modules()
        if isinstance(part, Normalizer)
    ]
    if not paths:
        return target
    out = target.clone(False).unlock_()
    for path in paths:
        for name in ("mean", "std", "fitted"):
            out.set((*path, name), parameters.get((*path, name)))
    return out


def _data(
    model: nn.Module, batch: TensorDictBase, keys: Sequence[NestedKey]
) -> TensorDictBase:
    """Return the batch with all of ``keys``; latents that it lacks are encoded."""
    keys = unique(keys)
    # Encoded anew for each module: those before it have just been fitted.
    data = _with_latents(model, batch, keys)
    missing = missing_from(data, keys)
    if missing:
        raise MissingEntryError(
            f"A normaliser is fitted to {missing}, and the batch has {leaf_keys(batch)}. Give a "
            f"batch of real transitions, as rollouts and collectors record them."
        )
    return data


def valid_rows(batch: TensorDictBase) -> TensorDictBase:
    """Return the rows that the batch's mask calls valid, ``[N]``; the batch without a mask.

    Raises:
        ValueError: if no row is left.
    """
    mask = batch.get(("collector", "mask"), None)
    if mask is not None:
        batch = batch[mask.reshape(batch.batch_size)]
    if not batch.batch_size.numel():
        raise ValueError(
            f"There is nothing to fit or compare: the batch has the batch size "
            f"{tuple(batch.batch_size)} once what its mask calls invalid is left out."
        )
    return batch


def _with_latents(
    model: nn.Module, batch: TensorDictBase, in_keys: Sequence
) -> TensorDictBase:
    """Return the batch, with the latents among ``in_keys`` that it lacks."""
    if not isinstance(model, WorldModel):
        return batch
    lacking = missing_from(batch, unique(in_keys))
    if not lacking or missing_from(batch, unique(model.encoder.in_keys)):
        return batch
    batch = batch.copy()
    with evaluation_mode(model):
        batch.update(model.encode(batch.select(*unique(model.encoder.in_keys))))
        nexts = [join("next", key) for key in unique(model.encoder.in_keys)]
        if any(map(is_next, lacking)) and not missing_from(batch, nexts):
            inputs = batch.get("next").select(*unique(model.encoder.in_keys))
            for key, value in model.encode(inputs).items(True, True):
                batch.set(join("next", key), value)
    return batch
