"""Policies that leave a run: files that run without this package.

``policies.py`` makes them from a run. ``program.py`` has a policy as a function of tensors, with
the forms of the env (``forms.py``), draws as inputs (``draws.py``) and no unused weights
(``used_parameters.py``); ``tracing.py`` exports it, ``formats.py`` writes and runs the files,
``description.py`` says what is in them, and ``check.py`` compares them with the run.
"""

from __future__ import annotations

from torchrl_wm.trainers.exporting.policies import (
    DeviationError,
    export_policy,
    ExportedPolicy,
)

__all__ = ["DeviationError", "ExportedPolicy", "export_policy"]
