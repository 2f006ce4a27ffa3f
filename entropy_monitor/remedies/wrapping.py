"""Wrappers of distributed training, which take stock of a model's parameters when they are made."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.hooks import module_names

_SHARDED = {"FullyShardedDataParallel", "FSDPModule"}


def require_unwrapped(model: object, remedy: str, why: str) -> None:
    """Raise unless this is a module in which nothing is wrapped by DistributedDataParallel or FSDP.

    Args:
        model: to be changed.
        remedy: what is to be done, for the error.
        why: what the wrapper would do or not do.

    Raises:
        ConfigurationError: with the wrapped module's name.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"{remedy}: model must be a torch.nn.Module, got {type(model).__name__}")
    for module, name in module_names(model).items():
        kinds = _sharding(module)
        if isinstance(module, DistributedDataParallel):
            kinds = {"DistributedDataParallel"}
        if kinds:
            raise ConfigurationError(
                f"{remedy}: {name} is wrapped by {min(kinds)}, {why}; call {remedy}(model, …) first, "
                "then wrap"
            )


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether a module is wrapped by FSDP, of either generation."""
    return bool(_sharding(module))


def _sharding(module: nn.Module) -> set[str]:
    return {c.__name__ for c in type(module).__mro__} & _SHARDED
