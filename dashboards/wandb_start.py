"""Finding W&B and starting a run with it: never asking the user anything, never writing to the console."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from entropy_monitor.dashboards.wandb_account import has_account
from entropy_monitor.errors import ConfigurationError, MissingExtraError
from entropy_monitor.records import RunInfo

logger = logging.getLogger("entropy_monitor")

MODES = ("online", "offline", "disabled", "shared")


def import_wandb(images: bool) -> Any:
    """The wandb module, and, if `images` are to be logged, proof that pillow is there.

    Raises:
        MissingExtraError: either is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise MissingExtraError("wandb", "wandb", "WandbLogger") from error
    # Offline runs leave a folder `wandb` behind, which Python imports as an empty package.
    if not hasattr(wandb, "init"):
        raise MissingExtraError("wandb", "wandb", "WandbLogger")
    if images:
        try:
            # Here, and not first on the threads of two sinks at once, where one would see half a module.
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("pillow", "wandb", "WandbLogger with heatmaps") from error
    return wandb


def check_arguments(run: Any, given: Mapping[str, Any]) -> None:
    """Says what is wrong with the arguments of a logger, before anything is started.

    Raises:
        ConfigurationError: an unknown `mode`, an object that is no run, or a run and arguments for a new one.
    """
    mode = given["mode"]
    if mode is not None and mode not in MODES:
        raise ConfigurationError(f"mode is {mode!r}; give one of {', '.join(MODES)}, or leave it out")
    if run is None:
        return
    needed = ("log", "define_metric", "alert", "summary", "config")
    missing = [name for name in needed if not hasattr(run, name)]
    if missing:
        raise ConfigurationError(
            f"run is a {type(run).__name__} without {', '.join(missing)}; give what wandb.init returned"
        )
    unused = [name for name, value in given.items() if value is not None]
    if unused:
        raise ConfigurationError(
            f"{', '.join(unused)} would start a new W&B run, and run is already one; give one or the other"
        )


def start_run(wandb: Any, arguments: Mapping[str, Any], info: RunInfo) -> Any:
    """Starts a run, silently: online where W&B finds an account, else offline.

    Args:
        wandb: the module.
        arguments: of `wandb.init`, among them `name`, `mode` and `dir`, which may be None.
        info: of the run that is watched; its directory's name is the default of `name`.

    Raises:
        ConfigurationError: `dir` cannot be used, or `mode` is `online` and there is no account.
    """
    init = dict(arguments)
    if init["dir"] is not None:
        init["dir"] = _make_folder(init["dir"])
    if init["name"] is None and info.run_dir is not None:
        init["name"] = Path(info.run_dir).name
    sources = [_namespace(init.get("settings")), wandb.setup().settings]
    if _goes_online(init["mode"], sources) and not any(has_account(source) for source in sources):
        if init["mode"] == "online":
            raise ConfigurationError(
                "WandbLogger(mode='online') found no W&B account; run `wandb login`, or leave "
                "mode out to record offline"
            )
        init["mode"] = "offline"
    # Silent, and hands off the user's stdout: this run belongs to a monitor.
    init.setdefault("settings", wandb.Settings(console="off", silent=True))
    run = wandb.init(**init)
    if init["mode"] == "offline":
        logger.info("W&B records offline; upload with: wandb sync %s", Path(run.dir).parent)
    return run


def _goes_online(mode: str | None, sources: Sequence[Any]) -> bool:
    """Whether W&B would go online, given `mode`, else the first of its settings that says otherwise."""
    if mode is not None:
        return mode == "online"
    return all(getattr(source, "mode", None) in (None, "online") for source in sources)


def _namespace(settings: Any) -> Any:
    """W&B takes settings as an object or as a dict."""
    return SimpleNamespace(**settings) if isinstance(settings, Mapping) else settings


def _make_folder(folder: str | os.PathLike[str]) -> str:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"WandbLogger cannot use dir {os.fspath(folder)}: {error}; give a folder to write to"
        ) from error
    return os.fspath(folder)
