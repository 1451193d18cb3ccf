"""Objects of the user's own modules: `module:attribute`."""

import importlib
import sys
from pathlib import Path
from typing import Any

from growlib.errors import GrowError


def imported(asked: str, name: str, valid: str) -> Any:
    """What `module:attribute` names; the working folder's modules count. Raises GrowError where it is not there."""
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a user's module raises
        raise GrowError(asked, f"{name} cannot be imported ({error})", valid) from error
    finally:
        sys.path.remove(here)
