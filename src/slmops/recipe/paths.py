"""Files that a recipe names: made absolute when it is read, bare names when it leaves this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from slmops.recipe.whole import Recipe, recipe_json


def portable_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON with files by their bare names: what may leave this machine inside a bundle.

    Where it ran (``azureml``) is left out: it changes nothing of what was made, and names somebody's account.
    """
    raw = recipe_json(recipe)
    raw["azureml"] = None
    for section, keys in (
        ("data", ("train", "validation", "test")),
        ("teacher", ("model",)),
        ("student", ("model",)),
        ("distill", ("unlabelled",)),
    ):
        for key in keys:
            value = raw[section][key]
            if value is not None and not has_scheme(value):
                raw[section][key] = Path(value).name
    for teacher in raw["teachers"]:
        if not has_scheme(teacher["model"]):
            teacher["model"] = Path(teacher["model"]).name
    for part in (raw["teacher"], raw["teacher"]["judge"]):
        if part is not None and isinstance(part["prices"], str):
            part["prices"] = Path(part["prices"]).name
    for made in raw["compress"]["formats"]:
        made["config"] = made["config"] and Path(made["config"]).name
    calibration = raw["compress"]["calibration"]
    calibration["data"] = calibration["data"] and Path(calibration["data"]).name
    train = raw["train"]
    for key in ("loss", "tracking_folder"):
        train[key] = train[key] and Path(train[key]).name
    if train["forgetting"]:
        train["forgetting"]["data"] = Path(train["forgetting"]["data"]).name
    evaluate = raw["evaluate"]
    evaluate["metrics"] = [Path(one).name if ".py:" in one else one for one in evaluate["metrics"]]
    for one in evaluate["benchmarks"]:
        for key in ("task", "data"):
            one[key] = one[key] and (one[key] if has_scheme(one[key]) else Path(one[key]).name)
    if raw["improve"]["forgetting"]:
        raw["improve"]["forgetting"]["data"] = Path(raw["improve"]["forgetting"]["data"]).name
    if raw["train"]["preferences"]:
        raw["train"]["preferences"]["file"] = Path(raw["train"]["preferences"]["file"]).name
    return raw


def anchor_paths(raw: dict[str, Any], folder: Path) -> None:
    """Make relative paths absolute, so that a recipe means the same from any working directory."""
    data = raw.get("data")
    if isinstance(data, dict):
        for key in ("train", "validation", "test"):
            if isinstance(data.get(key), str) and not has_scheme(data[key]):
                data[key] = str((folder / data[key]).resolve())
    compress = raw.get("compress")
    formats = _as_list(compress.get("formats")) if isinstance(compress, dict) else []
    for number, made in enumerate(formats):
        if isinstance(made, str) and made.startswith("olive:"):
            formats[number] = f"olive:{(folder / made.removeprefix('olive:')).resolve()}"
        elif isinstance(made, dict) and isinstance(made.get("config"), str):
            made["config"] = str((folder / made["config"]).resolve())
    if isinstance(compress, dict) and "formats" in compress:
        compress["formats"] = formats
    calibration = compress.get("calibration") if isinstance(compress, dict) else None
    if isinstance(calibration, dict) and isinstance(calibration.get("data"), str):
        calibration["data"] = str((folder / calibration["data"]).resolve())
    distill = raw.get("distill")
    texts = distill.get("unlabelled") if isinstance(distill, dict) else None
    if isinstance(distill, dict) and isinstance(texts, str) and not has_scheme(texts):
        distill["unlabelled"] = str((folder / texts).resolve())
    train = raw.get("train")
    if isinstance(train, dict):
        if isinstance(train.get("loss"), str) and ":" in train["loss"]:
            file, _, function = train["loss"].rpartition(":")
            train["loss"] = f"{(folder / file).resolve()}:{function}"
        if isinstance(train.get("tracking_folder"), str):
            train["tracking_folder"] = str((folder / train["tracking_folder"]).resolve())
        if isinstance(train.get("forgetting"), dict) and isinstance(train["forgetting"].get("data"), str):
            train["forgetting"]["data"] = str((folder / train["forgetting"]["data"]).resolve())
        pairs = train.get("preferences")
        if isinstance(pairs, str):
            train["preferences"] = str((folder / pairs).resolve())
        elif isinstance(pairs, dict) and isinstance(pairs.get("file"), str):
            pairs["file"] = str((folder / pairs["file"]).resolve())
    evaluate = raw.get("evaluate")
    if isinstance(evaluate, dict):
        _anchor_evaluate(evaluate, folder)
    improve = raw.get("improve")
    general = improve.get("forgetting") if isinstance(improve, dict) else None
    if isinstance(general, dict) and isinstance(general.get("data"), str):
        general["data"] = str((folder / general["data"]).resolve())
    teachers = [part for name in ("teacher", "teachers") for part in _as_list(raw.get(name))]
    for part in (*teachers, raw.get("student")):
        if isinstance(part, dict) and isinstance(part.get("model"), str) and (folder / part["model"]).is_dir():
            part["model"] = str((folder / part["model"]).resolve())
    teacher = raw.get("teacher")
    judge = teacher.get("judge") if isinstance(teacher, dict) else None
    for part in (teacher, judge):
        if isinstance(part, dict) and isinstance(part.get("prices"), str):
            part["prices"] = str((folder / part["prices"]).resolve())


def _anchor_evaluate(evaluate: dict[str, Any], folder: Path) -> None:
    if evaluate.get("metrics") is not None:
        evaluate["metrics"] = [
            f"{(folder / one.rpartition(':')[0]).resolve()}:{one.rpartition(':')[2]}"
            if isinstance(one, str) and ".py:" in one
            else one
            for one in _as_list(evaluate["metrics"])
        ]
    if evaluate.get("benchmarks") is None:
        return
    evaluate["benchmarks"] = [anchored_benchmark(one, folder) for one in _as_list(evaluate["benchmarks"])]


def anchored_benchmark(raw: Any, folder: Path) -> Any:
    """A benchmark as written, its files looked for in ``folder``; a YAML file that holds one of our sections (it has
    the key ``data``, where a task of the harness has others) is read in its place."""
    if isinstance(raw, str) and raw.endswith((".yaml", ".yml")):
        path = (folder / raw).resolve()
        section = _section_in(path)
        return str(path) if section is None else anchored_benchmark({"name": path.stem, **section}, path.parent)
    if not isinstance(raw, dict):
        return raw
    found = dict(raw)
    if isinstance(found.get("data"), str) and not has_scheme(found["data"]):
        found["data"] = str((folder / found["data"]).resolve())
    if isinstance(found.get("task"), str) and found["task"].endswith((".yaml", ".yml")):
        found["task"] = str((folder / found["task"]).resolve())
    return found


def _section_in(path: Path) -> dict[str, Any] | None:
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):  # missing, or with the harness' own tags
        return None
    return raw if isinstance(raw, dict) and "data" in raw else None


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def has_scheme(text: str) -> bool:
    return text.startswith(("hf:", "pypi:", "openai:", "sample:"))
