"""References that collectors leave behind in an env, made such that the env can be pickled."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from torchrl_wm import _upstream


class CollectorRef(weakref.ref):
    """A weak reference to a collector; a copy or a pickle of it is None: another env is not collected."""

    def __reduce__(self) -> tuple:
        return type(None), ()


def leave_out_collectors(*held: Any) -> None:
    """Let envs be pickled that acted in a collector.

    Collectors leave weak references in their envs, which no pickle takes. Here, they become
    references that do the same, and that a pickle leaves out.

    Args:
        held: envs, or anything else, which stays as it is.
    """
    for owner in held:
        for part in owner.modules() if isinstance(owner, nn.Module) else ():
            reference = part.__dict__.get(_upstream.COLLECTOR)
            if type(reference) is weakref.ref:
                collector = reference()
                part.__dict__[_upstream.COLLECTOR] = (
                    None if collector is None else CollectorRef(collector)
                )
