"""What goes wrong, in the user's words: every error says what was violated, with values, and the way out."""

from __future__ import annotations


class EntropyMonitorError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigurationError(EntropyMonitorError, ValueError):
    """An argument is wrong. Raised before training starts, with the value and the values allowed."""


class AttentionNotFoundError(EntropyMonitorError):
    """No attention was found in a model. Says what was looked for and how to name it by hand."""


class RunDirectoryError(EntropyMonitorError):
    """A run directory cannot be used: another model's run, not a run, or damaged beyond reading."""


class MissingExtraError(EntropyMonitorError, ImportError):
    """An optional dependency is needed and not installed. Names the extra to install."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {package}, which is not installed: pip install 'entropy-monitor[{extra}]'"
        )
