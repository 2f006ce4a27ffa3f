"""Whether W&B can log in without asking: a run without an account is recorded offline at once."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# One service under two names: a key kept under either serves both.
_SAAS = ("api.wandb.ai", "api.forge.coreweave.com")


def has_account(settings: Any) -> bool:
    """Whether W&B would find credentials in its settings, the environment or the netrc file.

    Neither asks the user nor the network, so that it cannot block; whether the key is valid is not
    known.

    Args:
        settings: W&B's own, as from `wandb.setup().settings`; `api_key`, `identity_token_file` and
            `base_url` are read where they are there.
    """
    if getattr(settings, "api_key", None) or getattr(settings, "identity_token_file", None):
        return True
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(str(getattr(settings, "base_url", ""))).netloc
    return any(_in_netrc(name) for name in (_SAAS if host in _SAAS else (host,)) if name)


def _in_netrc(host: str) -> bool:
    try:
        entry = netrc.netrc(_netrc_path()).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return False
    return entry is not None and bool(entry[2])


def _netrc_path() -> Path:
    """Where W&B looks: `$NETRC`, else `~/.netrc`, else `~/_netrc`."""
    if named := os.environ.get("NETRC"):
        return Path(named).expanduser()
    usual = Path("~/.netrc").expanduser()
    return usual if usual.exists() else Path("~/_netrc").expanduser()
