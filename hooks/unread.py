"""Why an attention call, or what looks like one, is not read."""

from __future__ import annotations


class UnreadError(ValueError):
    """A call is left out; the text says why, in the user's words."""


class HeadsUntoldError(UnreadError):
    """Heads are folded among sequences in an order that neither memory nor values tell."""
