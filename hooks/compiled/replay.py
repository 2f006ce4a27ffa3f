"""Reads a call of compiled code as in eager mode, from its plan and its tensors."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from entropy_monitor.hooks.calls import Seen
from entropy_monitor.hooks.compiled.plan import Plan, Thaw
from entropy_monitor.hooks.compiled.sites import ReplayedSite
from entropy_monitor.hooks.lineage import Lineage
from entropy_monitor.hooks.ownership import Identified, identify
from entropy_monitor.hooks.sources import source_named


def read(
    plan: Plan,
    thaw: Thaw,
    settled: dict[Hashable, Any],
    owner: nn.Module,
    name: str,
    lineage: Lineage | None,
) -> tuple[Seen, Identified] | None:
    """What a call of an owner of a name attends with, and its projections; see `ReplayedSite`."""
    site = ReplayedSite(plan, thaw, settled, lineage)
    device, dtype = plan.autocast or ("cpu", None)
    with torch.no_grad(), torch.autocast(device, dtype, enabled=plan.autocast is not None):
        seen = source_named(plan.source).read(thaw(plan.args), thaw(plan.kwargs), site)
        if seen is None:
            return None
        found = identify(seen, site, owner, name)
        found.projections.update({role: thaw(whole) for role, whole in plan.later})
    return seen, found
