"""Rows of each site: read, partitioned, split, and made into records."""

from __future__ import annotations

from flower_app.data.site import Simulation, SiteRows, label_names, load_site, simulated_sites
from flower_app.data.source import DataError, load_rows

__all__ = [
    "DataError",
    "Simulation",
    "SiteRows",
    "label_names",
    "load_rows",
    "load_site",
    "simulated_sites",
]
