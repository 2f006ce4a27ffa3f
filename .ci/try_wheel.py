"""Imports the installed package and measures a model; the argument is the checkout that must not be used."""

import sys
from importlib.metadata import entry_points
from pathlib import Path

import torch

import entropy_monitor as em
import entropy_monitor.dashboards
import entropy_monitor.hooks
from entropy_monitor.dashboards.web.assets import static_assets

checkout = Path(sys.argv[1]).resolve()
for module in (em, entropy_monitor.hooks, entropy_monitor.dashboards):
    home = Path(module.__file__ or "").resolve()
    if checkout in home.parents:
        sys.exit(f"{module.__name__} was imported from the checkout: {home}")

# What is no Python file is easily left out of a wheel.
missing = {"index.html", "style.css", "main.js", "plotly.js"} - set(static_assets())
if missing:
    sys.exit(f"the page lacks {missing}")
(tab,) = entry_points(group="tensorboard_plugins", name="entropy_monitor")
tab.load()

table = em.measure(torch.nn.TransformerEncoderLayer(32, 4, batch_first=True), torch.randn(2, 8, 32))
if len(table) != 4 or not (table["entropy"] > 0).all():
    sys.exit(f"measure returned\n{table}")
print(table[["layer", "head", "entropy", "max_entropy"]].to_string(index=False))
