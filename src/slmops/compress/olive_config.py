"""A configuration file of Microsoft Olive, as far as this tool has to understand it.

What it says of passes, data and systems goes to Olive as it stands; the model, the places of output and cache, and
what Olive keeps besides are set here. Checked before anything is trained: the file, and the names of its passes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from slmops.errors import RecipeError

OURS = ("input_model", "output_dir", "cache_dir", "no_artifacts", "evaluate_input_model", "log_to_file")
"""Keys of the file that are replaced."""
HERE = {
    "type": "LocalSystem",
    "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
}


def read_olive_config(path: Path) -> dict[str, Any]:
    """The file's contents, in JSON or YAML.

    Raises:
        RecipeError: it is not there, cannot be read, or names no passes or one that the installed Olive does not have.
    """
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))  # JSON is YAML
    except FileNotFoundError:
        raise RecipeError(f"compress.formats: there is no file {path} for Olive.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        first = str(error).splitlines()[0]
        raise RecipeError(f"compress.formats: {path} cannot be read: {first}") from None
    if not isinstance(raw, dict) or not raw.get("passes") or not isinstance(raw["passes"], dict):
        raise RecipeError(
            f"compress.formats: {path} names no passes.",
            remedy='For example {"passes": {"build": {"type": "ModelBuilder", "precision": "int4"}}}',
        )
    known = known_passes()
    for name, one in passes_of(raw):
        kind = one.get("type") if isinstance(one, Mapping) else None
        if not isinstance(kind, str):
            raise RecipeError(f"compress.formats: the pass {name} in {path} has no type.")
        if known and kind.lower() not in known:
            raise RecipeError(
                f"compress.formats: the pass {name} in {path} is of the type {kind}, which Olive does not have."
            )
    return raw


def passes_of(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and settings of the passes, in their order; a name may hold several."""
    for name, value in config["passes"].items():
        for one in value if isinstance(value, list) else [value]:
            yield name, one


def known_passes() -> frozenset[str]:
    """Types of passes of the installed Olive in small letters; empty where none is installed."""
    found = find_spec("olive")
    if found is None or not found.submodule_search_locations:
        return frozenset()
    path = Path(next(iter(found.submodule_search_locations))) / "olive_config.json"
    if not path.is_file():
        return frozenset()
    return frozenset(name.lower() for name in json.loads(path.read_text("utf-8")).get("passes", {}))


def stored_as(config: Mapping[str, Any]) -> str:
    """The precision that a single ``ModelBuilder`` leads to; ``olive`` where more was done."""
    passes = [one for _, one in passes_of(config)]
    if len(passes) == 1 and str(passes[0]["type"]).lower() == "modelbuilder":
        return str(passes[0].get("precision") or "olive").lower()
    return "olive"


def workflow(config: Mapping[str, Any], model: Path, output: Path, cache: Path) -> dict[str, Any]:
    """What Olive is asked to run: the file's contents on ``model``, on this machine where the file names none. Pure."""
    kept = {key: value for key, value in config.items() if key not in OURS}
    made = {
        **kept,
        "input_model": {"type": "HfModel", "model_path": str(model), "task": "text-generation"},
        "output_dir": str(output),
        "cache_dir": str(cache),
        "no_artifacts": True,
        "evaluate_input_model": False,
    }
    engine = made.get("engine")
    named = {*made, *(engine if isinstance(engine, Mapping) else ())}
    if not named & {"host", "target"}:
        made["systems"] = {**(made.get("systems") or {}), "slmops_here": HERE}
        made |= {"host": "slmops_here", "target": "slmops_here"}
    return made
