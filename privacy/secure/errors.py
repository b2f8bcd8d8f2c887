"""What goes wrong in secure aggregation."""

from __future__ import annotations


class SecureError(ValueError):
    """A step that is refused, because someone does not keep to the protocol: says who and how."""
