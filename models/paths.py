"""Paths as a person configures them."""

from __future__ import annotations

import os
from pathlib import Path


def located(path: str) -> Path:
    """The path, with `~` and `$VARIABLES` as this machine and this process have them.

    So that a configuration which travels can name a place of each machine without telling where
    it is. A variable that is not set stays as it is written.
    """
    return Path(os.path.expandvars(path)).expanduser()
