"""Privacy: what leaves a site, how it is protected, and how much protection is spent."""

from privacy.accounting import epsilon

__all__ = ["epsilon"]
