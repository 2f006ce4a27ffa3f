"""Who may ask, and what every answer tells the browser not to do."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

from werkzeug import Request

_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    # Plotly sets styles on its elements.
    "style-src": "'self' 'unsafe-inline'",
    # It draws heatmaps as images in data URLs, and hands out pictures as blobs.
    "img-src": "'self' data: blob:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
}


def headers(*, framed: bool) -> Mapping[str, str]:
    """The headers of every answer.

    Args:
        framed: whether pages of this same server may show the page in a frame.
    """
    policy = {**_POLICY, "frame-ancestors": "'self'" if framed else "'none'"}
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "SAMEORIGIN" if framed else "DENY",
    }


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine, and cannot be anything else."""
    name = host.strip("[]").lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def asks_for_this_machine(request: Request) -> bool:
    """Whether the `Host` header names this machine.

    A page elsewhere can point a name of its own at 127.0.0.1 and have the visitor's browser read from
    here (DNS rebinding); its requests carry that name. Any port is right: it may have been forwarded.
    """
    host = request.environ.get("HTTP_HOST", "")
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    return is_loopback(name)
