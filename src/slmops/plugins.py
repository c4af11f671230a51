"""Functions of a user's own: in a file beside the recipe, or in an installed package by an entry point.

The file is run as it is: it is the user's own code, like the recipe. Guarantees: whatever is wrong with the reference
is said with the recipe's key, before any work.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from slmops.errors import RecipeError


def load_function(reference: str, *, key: str) -> Callable[..., Any]:
    """The function that ``reference`` (``path/to/file.py:function``) names; ``key``: of the recipe, for the message.

    Raises:
        RecipeError: no such file or function, or the file cannot be run.
    """
    file, separator, name = reference.rpartition(":")
    path = Path(file)
    if not separator or not file:
        raise RecipeError(f"{key} is {reference!r}.", remedy="Write it as FILE.py:FUNCTION.")
    if not path.is_file():
        raise RecipeError(f"{key} names {path}, which is not there.", remedy="Put the file beside the recipe.")
    spec = importlib.util.spec_from_file_location(f"slmops_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{key} names {path}, which is no Python file.", remedy="Name a file that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RecipeError(f"{path} cannot be run: {type(error).__name__}: {error}.") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = ", ".join(n for n, v in vars(module).items() if inspect.isfunction(v)) or "none"
        raise RecipeError(f"{path} has no function {name}.", remedy=f"Functions there: {known}.")
    return function  # type: ignore[no-any-return]


def load_entry_point(name: str, group: str, *, key: str) -> Callable[..., Any]:
    """The function that an installed package offers as ``name`` in ``group``.

    Raises:
        RecipeError: nobody offers it, or it cannot be imported.
    """
    found = entry_points(group=group, name=name)
    if not found:
        known = ", ".join(sorted(one.name for one in entry_points(group=group))) or "none"
        raise RecipeError(
            f"{key} names {name}, which no installed package offers.",
            remedy=f"Write FILE.py:FUNCTION, or install the package; entry points in the group {group}: {known}.",
        )
    try:
        function = next(iter(found)).load()
    except Exception as error:
        raise RecipeError(f"{key}: {name} cannot be imported: {type(error).__name__}: {error}.") from error
    if not callable(function):
        raise RecipeError(f"{key}: {name} is a {type(function).__name__}, not a function.")
    return function  # type: ignore[no-any-return]
