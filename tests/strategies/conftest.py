"""Settings of the property tests in this folder."""

from __future__ import annotations

from hypothesis import settings

# No time limit per example: on a loaded machine any single one may be slow.
settings.register_profile("strategies", deadline=None)
settings.load_profile("strategies")
