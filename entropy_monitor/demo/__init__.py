"""The demonstration: a small Vision Transformer on digits, trained soundly, far too fast, and cured."""

from __future__ import annotations

from entropy_monitor.demo.runs import demo_run
from entropy_monitor.demo.show import show_demo
from entropy_monitor.demo.training import RECIPES, Recipe, train

__all__ = ["RECIPES", "Recipe", "demo_run", "show_demo", "train"]
