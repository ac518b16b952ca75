"""How the components of a world model fit together, key by key."""

from __future__ import annotations

from collections.abc import Mapping

from tensordict import NestedKey
from tensordict.nn import TensorDictModuleBase
from torch import nn

from torchrl_wm.modules.keys import is_next, join, strip_next, unique


def check_component(name: str, module: nn.Module) -> None:
    """Refuse a component that does not say which keys it reads and writes.

    Raises:
        TypeError: if ``module`` is not an ``nn.Module`` with ``in_keys`` and
            ``out_keys``.
    """
    keyed = hasattr(module, "in_keys") and hasattr(module, "out_keys")
    if isinstance(module, TensorDictModuleBase) or (
        isinstance(module, nn.Module) and keyed
    ):
        return
    raise TypeError(
        f"{name} must be a TensorDictModule, which names the entries that it reads and "
        f"writes, got {type(module).__name__}. Wrap it: TensorDictModule(module, "
        f"in_keys=[...], out_keys=[...])."
    )


def written_keys(module: nn.Module) -> list[NestedKey]:
    """Return the keys that ``module`` writes (``"_"`` marks outputs that are thrown away)."""
    return [key for key in unique(module.out_keys) if key != "_"]


def latents_of(step: nn.Module) -> list[NestedKey]:
    """Return the latents: the root keys that a step reads and also writes under "next"."""
    written = set(unique(step.out_keys))
    read = [key for key in unique(step.in_keys) if not is_next(key)]
    return [key for key in read if join("next", key) in written]


def check_memory(
    memory: list[NestedKey],
    moving: list[NestedKey],
    components: Mapping[str, nn.Module],
) -> None:
    """Refuse memory that no step carries, or that a component takes for an observation or a latent.

    Args:
        memory: the keys of the entries that are carried and not recorded.
        moving: all root keys that a step reads and also writes under "next".
        components: the components by name.

    Raises:
        ValueError: if a key is not carried by the step, if encoder, posterior or decoder read
            or write it, or if a head reads it after another component has written the next one.
    """
    still = [key for key in memory if key not in moving]
    if still:
        raise ValueError(
            f"memory={still} is not carried from step to step: the step reads and also writes "
            f"under 'next' {moving}. Let dynamics, or a head, have in_keys=[{still[0]!r}, ...] and "
            f"out_keys=[{join('next', still[0])!r}, ...]."
        )
    for name in ("encoder", "posterior", "decoder"):
        module = components.get(name)
        if module is None:
            continue
        keys = [*unique(module.in_keys), *written_keys(module)]
        taken = [key for key in memory if key in map(strip_next, keys)]
        if taken:
            raise ValueError(
                f"{name} has the memory {taken} among its keys, and only the step has memory: it "
                f"is neither observed, corrected nor decoded. Leave {taken} out of memory=..., so "
                f"that it is a latent, or give the entry of {name} another key."
            )
    writer = {
        strip_next(key): name
        for name, module in components.items()
        for key in written_keys(module)
        if strip_next(key) in memory
    }
    order = list(components)
    for name, module in components.items():
        read = [key for key in unique(module.in_keys) if key in writer]
        late = [key for key in read if order.index(writer[key]) < order.index(name)]
        if late:
            raise ValueError(
                f"{name} reads the memory {late} of the step before, and {writer[late[0]]} may have "
                f"written into it by then. Let it read {join('next', late[0])!r}, or give it a "
                f"memory of its own."
            )


def check_wiring(components: Mapping[str, nn.Module]) -> None:
    """Refuse components whose keys cannot work together.

    Args:
        components: the components by name, in the order in which they run.

    Raises:
        ValueError: if a component reads a ``("next", k)`` that nothing before
            it writes, or if two components write one key.
    """
    writer: dict[NestedKey, str] = {}
    for name, module in components.items():
        for key in unique(module.in_keys):
            if is_next(key) and key not in writer:
                raise ValueError(_unwritten_message(name, key, components, writer))
        for key in written_keys(module):
            if key in writer:
                fix = "Give one of them another out_key, or leave one out."
                if name == "dynamics" and key in unique(module.in_keys):
                    fix = (
                        f"Predictions stand under 'next': let dynamics have "
                        f"out_keys=[{join('next', key)!r}]."
                    )
                raise ValueError(
                    f"Both {writer[key]} and {name} write {key!r}, so one would overwrite "
                    f"the other. {fix}"
                )
            writer[key] = name


def check_posterior(
    posterior: nn.Module, encoder: nn.Module, dynamics: nn.Module
) -> None:
    """Refuse a posterior that cannot correct what the dynamics predict.

    A posterior reads predicted latents and an encoded observation, both below "next" or
    both at the root, and writes latents at the same place.

    Raises:
        ValueError: if it reads what neither dynamics nor the encoder write, or
            writes no latent.
    """
    predicted = {strip_next(key) for key in written_keys(dynamics) if is_next(key)}
    available = predicted | set(written_keys(encoder))
    reads = unique(posterior.in_keys)
    for key in reads:
        if is_next(key) != is_next(reads[0]):
            raise ValueError(
                f"posterior reads {reads}, some below 'next' and some not. Both the predicted "
                f"latents and the encoded observation are those of the next step: name them "
                f"all ('next', ...), or none."
            )
        if strip_next(key) not in available:
            raise ValueError(
                f"posterior reads {key!r}, but neither dynamics nor the encoder write "
                f"{strip_next(key)!r}. They write {sorted(available, key=str)}."
            )
    writes = {strip_next(key) for key in written_keys(posterior)}
    if not writes & predicted:
        raise ValueError(
            f"posterior writes {written_keys(posterior)}, none of which is a latent that "
            f"dynamics predict: {sorted(predicted, key=str)}. Let it write the latents that it "
            f"corrects."
        )


def _unwritten_message(
    name: str,
    key: NestedKey,
    components: Mapping[str, nn.Module],
    writer: Mapping[NestedKey, str],
) -> str:
    """Return the error message for a key that is read before anything writes it."""
    later = [
        other for other, module in components.items() if key in written_keys(module)
    ]
    written = sorted((k for k in writer if is_next(k)), key=str)
    if later:
        cause = f"{later[0]} writes it only afterwards"
        fix = f"Move what computes {key!r} into a component that runs before {name}"
    else:
        cause = "no component writes it"
        fix = f"Add {key!r} to the out_keys of dynamics, or read another key"
    return (
        f"{name} reads {key!r}, but {cause}. Written under 'next' before {name} runs: "
        f"{written}. {fix} (order: {' -> '.join(components)})."
    )
