"""From YAML or a mapping to a checked :class:`~slmops.recipe.whole.Recipe`, and back to JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from slmops.errors import RecipeError
from slmops.recipe.paths import anchor_paths, has_scheme
from slmops.recipe.problems import TAGS, TEMPLATES, Location, in_words, line_numbers, line_of, remedy_for
from slmops.recipe.search import Range
from slmops.recipe.whole import Recipe, recipe_json


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at ``path`` and apply ``overrides``, each ``"data.train=other.csv"``.

    Raises:
        RecipeError: with file and line, for anything that cannot be run as written.
    """
    recipe_path = Path(path)
    try:
        text = recipe_path.read_text("utf-8")
    except FileNotFoundError:
        raise RecipeError(f"There is no recipe at {recipe_path}.", remedy="Write one with: slmops init") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe cannot be read: {error}.", path=recipe_path) from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(
            f"This is not YAML: {problem}.", path=recipe_path, line=mark.line + 1 if mark else None
        ) from None
    if not isinstance(raw, dict):
        raise RecipeError("A recipe is a mapping of keys.", path=recipe_path, remedy="Write one with: slmops init")
    anchor_paths(raw, recipe_path.parent)
    for override in overrides:
        _apply_override(raw, override)
    lines = line_numbers(root)
    return _validate(raw, path=recipe_path, lines=lines)


def parse_recipe(raw: Mapping[str, Any]) -> Recipe:
    """A recipe from a mapping (for Python users and tests). Raises :class:`RecipeError`."""
    return _validate(dict(raw), path=None, lines={})


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """``recipe`` with the keys of ``values`` (``"train.learning_rate"``) changed, and without its search.

    Raises:
        RecipeError: there is no such key, or it does not take this value.
    """
    raw = recipe_json(recipe)
    raw["search"] = None
    if raw["compress"]["prune"] is None and any(name.startswith(f"{SEARCHED_PRUNE}.") for name in values):
        raw["compress"]["prune"] = {}
    for name, value in values.items():
        section: Any = raw
        *parents, last = name.split(".")
        for number, parent in enumerate(parents):
            if not isinstance(section.get(parent), dict):
                raise RecipeError(f"Unknown key {'.'.join(parents[: number + 1])}.")
            section = section[parent]
        section[last] = value
    return _validate(raw, path=None, lines={})


SEARCHED = ("student", "distill", "train")
SEARCHED_PRUNE = "compress.prune"
_NOT_COMPARABLE = {
    "train.max_tokens": "it changes what the validation loss is measured on",
    "train.preferences": "the validation loss is taken before the preferences are learnt",
}
_NOT_COMPARABLE_OPEN = {
    "student.model": "losses by token of different tokenizers do not compare",
    "student.vocabulary": "losses by token of different tokenizers do not compare",
}


def _space_problem(recipe: Recipe) -> tuple[str, str, str | None] | None:
    """Key, message and remedy of the first part of the search space that cannot be searched."""
    excluded = _NOT_COMPARABLE | ({} if recipe.closed else _NOT_COMPARABLE_OPEN)
    for key, values in recipe.search.space.items() if recipe.search else ():
        name = f"search.space.{key}"
        pruned = key.startswith(f"{SEARCHED_PRUNE}.") and recipe.search is not None and recipe.search.goal == "budget"
        if not pruned and (key.split(".")[0] not in SEARCHED or "." not in key):
            remedy = f"Keys of these sections can: {', '.join(SEARCHED)}; with goal: budget also {SEARCHED_PRUNE}."
            return key, f"{name} cannot be searched.", remedy
        for closed_to, why in excluded.items():
            if f"{key}.".startswith(f"{closed_to}."):
                return key, f"{name} cannot be searched: {why}.", None
        if isinstance(values, Range):
            if problem := _range_problem(values):
                return key, f"{name}: {problem}.", None
            tried: tuple[Any, ...] = (values.low, values.high)
        else:
            if len(set(map(repr, values))) < max(2, len(values)):
                return key, f"{name} is {list(values)}: it needs two or more different values.", None
            tried = values
        for value in tried:
            try:
                with_values(recipe, {key: value})
            except RecipeError as error:
                return key, f"{name} cannot be {value!r}. {error.message}", error.remedy
    return None


def _range_problem(values: Range) -> str | None:
    if not values.low < values.high:
        return f"low is {values.low} and high is {values.high}; low must be less"
    if values.log and values.low <= 0:
        return f"low is {values.low}, and a logarithm needs more than 0"
    if values.step is not None and values.log:
        return f"step is {values.step}, which does not go with log"
    if values.step is not None and values.step > values.high - values.low:
        return f"step is {values.step}, which is more than lies between {values.low} and {values.high}"
    if values.step is not None and values.whole and not isinstance(values.step, int):
        return f"step is {values.step}, but both ends are whole numbers"
    return None


def _validate(raw: dict[str, Any], *, path: Path | None, lines: Mapping[Location, int]) -> Recipe:
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        problems = error.errors()
        # A misspelled key is unknown, and the right one missing: the former says more.
        first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
        location: Location = tuple(part for part in first["loc"] if part not in TAGS)
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise RecipeError(
            in_words(first, location) + more,
            path=path,
            line=line_of(location, lines),
            remedy=remedy_for(first, location),
        ) from None
    if problem := _space_problem(recipe):
        key, message, remedy = problem
        raise RecipeError(message, path=path, line=line_of(("search", "space", key), lines), remedy=remedy)
    return recipe


def _apply_override(raw: dict[str, Any], override: str) -> None:
    name, separator, value = override.partition("=")
    if not separator or not name:
        raise RecipeError(f"--set {override} is not KEY=VALUE.", remedy="For example: --set data.train=my.csv")
    section = raw
    *parents, last = name.split(".")
    for parent in parents:
        below = section.setdefault(parent, {})
        if not isinstance(below, dict):
            raise RecipeError(f"--set {override}: {parent} holds a value, not a section.")
        section = below
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        parsed = value
    section[last] = value if (*parents, last) in TEMPLATES and parsed is not None else parsed
    files = {"data.train", "data.validation", "data.test", "distill.unlabelled", "compress.calibration.data"}
    if name in files and parsed is not None and not has_scheme(value):
        section[last] = str(Path(value).resolve())
    if name in {"teacher.prices", "teacher.judge.prices"} and isinstance(parsed, str):
        section[last] = str(Path(value).resolve())
