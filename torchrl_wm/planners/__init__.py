"""What acts by search: planners that imagine candidate plans and take the best one's first action."""

from __future__ import annotations

from torchrl_wm.planners.base import MPCPlanner
from torchrl_wm.planners.cem import CEMPlanner
from torchrl_wm.planners.icem import ICEMPlanner
from torchrl_wm.planners.mppi import MPPIPlanner

__all__ = ["CEMPlanner", "ICEMPlanner", "MPCPlanner", "MPPIPlanner"]
