"""The commands of `entropy-monitor`, one module each; `entropy_monitor.cli` runs them."""

from __future__ import annotations

from entropy_monitor.commands.base import Command
from entropy_monitor.commands.check import Check
from entropy_monitor.commands.compare import Compare
from entropy_monitor.commands.demo import Demo
from entropy_monitor.commands.doctor import Doctor
from entropy_monitor.commands.export import Export
from entropy_monitor.commands.report import Report
from entropy_monitor.commands.serve import Serve

COMMANDS: tuple[Command, ...] = (Demo(), Serve(), Report(), Compare(), Check(), Export(), Doctor())
"""In the order of the help."""

__all__ = ["COMMANDS", "Command"]
