"""Diagnostics: measure how good a world model is."""

from __future__ import annotations

from torchrl_wm.diagnostics.calibration import calibration_curve
from torchrl_wm.diagnostics.compare_frames import render_comparison
from torchrl_wm.diagnostics.disagreements import disagreement
from torchrl_wm.diagnostics.drawn_observations import observation_renderer
from torchrl_wm.diagnostics.dreams import open_loop_video
from torchrl_wm.diagnostics.fan import prediction_fan
from torchrl_wm.diagnostics.fitted_q import fitted_q_value
from torchrl_wm.diagnostics.importance import importance_weighted_value
from torchrl_wm.diagnostics.one_step import one_step_prediction
from torchrl_wm.diagnostics.open_loop import open_loop_error
from torchrl_wm.diagnostics.page import ReportSection
from torchrl_wm.diagnostics.plots import (
    plot_open_loop_error,
    plot_prediction,
    plot_prediction_fan,
    plot_reward_error,
)
from torchrl_wm.diagnostics.policy_measures import (
    policy_disagreement,
    policy_distance,
    policy_return,
)
from torchrl_wm.diagnostics.policy_plots import (
    plot_policy_departure,
    plot_policy_return,
)
from torchrl_wm.diagnostics.policy_report import PolicyReport, write_policy_report
from torchrl_wm.diagnostics.report import Report, write_report
from torchrl_wm.diagnostics.returns import exploitation_gap
from torchrl_wm.diagnostics.rewards import reward_error
from torchrl_wm.diagnostics.statistics_plots import (
    plot_calibration,
    plot_disagreement,
    plot_exploitation_gap,
    plot_one_step,
    plot_terminations,
)
from torchrl_wm.diagnostics.terminations import termination_metrics
from torchrl_wm.diagnostics.video_files import save_video

__all__ = [
    "PolicyReport",
    "Report",
    "ReportSection",
    "calibration_curve",
    "disagreement",
    "exploitation_gap",
    "fitted_q_value",
    "importance_weighted_value",
    "observation_renderer",
    "one_step_prediction",
    "open_loop_error",
    "open_loop_video",
    "plot_calibration",
    "plot_disagreement",
    "plot_exploitation_gap",
    "plot_one_step",
    "plot_open_loop_error",
    "plot_policy_departure",
    "plot_policy_return",
    "plot_prediction",
    "plot_prediction_fan",
    "plot_reward_error",
    "plot_terminations",
    "policy_disagreement",
    "policy_distance",
    "policy_return",
    "prediction_fan",
    "render_comparison",
    "reward_error",
    "save_video",
    "termination_metrics",
    "write_policy_report",
    "write_report",
]
