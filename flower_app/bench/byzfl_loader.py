"""byzfl's aggregators without its `__init__`, which would import a whole experiment stack."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

_NAME = "byzfl"


class ByzflMissing(ImportError):
    """byzfl, or what its aggregators need, is not installed."""


def load_byzfl() -> Any:
    """The module `byzfl.aggregators` (Median, Krum, NNM, ...); raises ByzflMissing.

    `sys.modules` is afterwards as it was before.
    """
    spec = importlib.util.find_spec(_NAME)
    if spec is None or spec.submodule_search_locations is None:
        raise ByzflMissing("byzfl is not installed; ./scripts/setup dev installs it.")
    before = _take_out()
    bare = ModuleType(_NAME)
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules[_NAME] = bare
    try:
        return importlib.import_module(f"{_NAME}.aggregators")
    except ImportError as error:
        raise ByzflMissing(f"byzfl's aggregators cannot be imported: {error}.") from error
    finally:
        _take_out()
        sys.modules.update(before)


def _take_out() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] == _NAME]
    return {name: sys.modules.pop(name) for name in names}
