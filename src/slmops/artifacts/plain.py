"""Values as plain JSON, so that a manifest can always be written and reads back as the same value.

A metric that could not be computed (NaN, infinity) becomes null with a warning: an hour of training is not lost over
it. Configuration has no such excuse, and is refused.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Literal

from slmops.errors import ArtifactError

logger = logging.getLogger(__name__)


def plain_json(value: Any, name: str, *, non_finite: Literal["null", "refuse"] = "null") -> Any:
    """``value`` in JSON's own types. ``name`` says where it stands, for messages.

    Tuples become lists, keys become text, paths become text; numpy's scalars and arrays become numbers and lists.

    Raises:
        ArtifactError: NaN or infinity, with ``non_finite="refuse"``.
        TypeError: something that JSON has no form for.
    """
    match value:
        case None | bool():
            return value
        case str():
            return value.encode("utf-8", "backslashreplace").decode("utf-8")
        case int():
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else _non_finite(value, name, non_finite)
        case PurePath():
            return str(value)
        case Mapping():
            return {str(key): plain_json(part, f"{name}.{key}", non_finite=non_finite) for key, part in value.items()}
        case list() | tuple():
            return [plain_json(part, f"{name}[{i}]", non_finite=non_finite) for i, part in enumerate(value)]
    if hasattr(value, "tolist"):
        return plain_json(value.tolist(), name, non_finite=non_finite)
    raise TypeError(f"{name} is a {type(value).__name__}, which JSON cannot carry")


def _non_finite(value: float, name: str, rule: Literal["null", "refuse"]) -> None:
    if rule == "refuse":
        raise ArtifactError(f"{name} is {value}, which is not a number to work with.", remedy="Give a finite number.")
    logger.warning("%s is %s; the manifest says null", name, value)
