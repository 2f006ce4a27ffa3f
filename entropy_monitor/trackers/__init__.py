"""What trackers are told of a run: named numbers, bounded for deep models; and any callable as a sink."""

from entropy_monitor.trackers.function_logger import FunctionLogger, MetricFunction

__all__ = ["FunctionLogger", "MetricFunction"]
