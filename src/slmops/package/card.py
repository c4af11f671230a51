"""The model card: Markdown with the front matter that model hubs read. Pure: what was measured in, text out.

Numbers are printed only where they were measured; what is not known is left out, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

LABELS_SHOWN = 100
IDENTIFIERS = frozenset(
    [
        "apache-2.0",
        "mit",
        "bsd-2-clause",
        "bsd-3-clause",
        "cc-by-4.0",
        "cc-by-sa-4.0",
        "cc-by-nc-4.0",
        "cc0-1.0",
        "gpl-3.0",
        "lgpl-3.0",
        "mpl-2.0",
        "openrail",
        "bigscience-openrail-m",
        "gemma",
        "llama2",
        "llama3",
        "llama3.1",
        "llama3.2",
        "llama3.3",
        "llama4",
    ]
)
PIPELINE_TAGS = {
    "classification": "text-classification",
    "nli": "text-classification",
    "qa": "question-answering",
    "summarization": "summarization",
}


def render_card(
    description: Mapping[str, Any],
    report: Mapping[str, Any],
    *,
    recipe: Mapping[str, Any],
    licenses: Mapping[str, str],
    lineage: Mapping[str, Any],
    model_bytes: int = 0,
) -> str:
    """The whole card. ``description`` is slmops.json's content, ``report`` that of report.json."""
    name = str(description.get("name") or recipe.get("name") or report.get("name") or "model")
    sections = [
        _front_matter(description, report, recipe, licenses, lineage),
        f"# {name}",
        _what(description, model_bytes),
        _labels(description.get("labels")),
        _measured(report),
        _limits(description, report),
        _origin(recipe, lineage),
        _licences(licenses),
        _how_to_run(description, name),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def license_id(text: str) -> str | None:
    """The identifier that hubs use, where the text is one of the licences met most, or a line that ends in an
    identifier (``hf:owner/name: apache-2.0``); None for any other text."""
    words = text.lower().split()
    head = " ".join(words[:100])
    if "apache license" in head and "version 2.0" in head:
        return "apache-2.0"
    if "permission is hereby granted, free of charge" in head:
        return "mit"
    if "creative commons attribution 4.0" in head:
        return "cc-by-4.0"
    last = words[-1] if 0 < len(words) <= 4 else ""
    return last if last in IDENTIFIERS else None


def _front_matter(
    description: Mapping[str, Any],
    report: Mapping[str, Any],
    recipe: Mapping[str, Any],
    licenses: Mapping[str, str],
    lineage: Mapping[str, Any],
) -> str:
    task = str(description.get("task") or recipe.get("task") or "")
    # The weights are under their base model's licence; where it is not told apart, all have to agree.
    texts = [licenses["base-model"]] if "base-model" in licenses else licenses.values()
    identifiers = {license_id(text) for text in texts}
    front: dict[str, Any] = {
        "license": identifiers.pop() or "other" if len(identifiers) == 1 else "other",
        "pipeline_tag": PIPELINE_TAGS.get(task, "text-generation"),
        "library_name": "onnxruntime-genai" if description.get("runtime") == "onnx-genai" else "onnxruntime",
        "tags": ["slmops", *([task] if task else []), *([p] if (p := description.get("precision")) else [])],
    }
    base = base_model(recipe, lineage)
    if base:
        front["base_model"] = base
    if report.get("metric"):
        front["metrics"] = [report["metric"]]
    return "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---"


def base_model(recipe: Mapping[str, Any], lineage: Mapping[str, Any]) -> str | None:
    """The model that the weights come from: what the lineage says, else the recipe's student, else its teacher."""
    if lineage.get("base_model"):
        return str(lineage["base_model"])
    for part in ("student", "teacher"):
        model = (recipe.get(part) or {}).get("model")
        if model:
            return str(model)
    return None


def _what(description: Mapping[str, Any], model_bytes: int) -> str:
    form = (
        "It chooses one of a fixed set of labels, in one forward pass."
        if description.get("form") == "classifier"
        else "It writes text, token by token."
    )
    facts = [
        ("Task", description.get("task")),
        ("Parameters", f"{parameters:,}" if (parameters := description.get("parameters")) else None),
        ("Precision", description.get("precision")),
        ("Size on disk", _megabytes(model_bytes) if model_bytes else None),
        ("Runtime", description.get("runtime")),
        ("System message", description.get("system")),
    ]
    return form + "\n\n" + "\n".join(f"- {what}: {value}" for what, value in facts if value)


def _labels(labels: list[str] | None) -> str:
    if not labels:
        return ""
    shown = ", ".join(f"`{label}`" for label in labels[:LABELS_SHOWN])
    more = f" and {len(labels) - LABELS_SHOWN} more" if len(labels) > LABELS_SHOWN else ""
    return f"## Labels\n\n{len(labels)}: {shown}{more}."


def _measured(report: Mapping[str, Any]) -> str:
    metric = str(report.get("metric") or "score")
    named = [("this model", report.get("student")), ("its teacher", report.get("teacher"))]
    named += [(f"baseline: {name}", row) for name, row in (report.get("baselines") or {}).items()]
    rows = [_table_row(name, row) for name, row in named if isinstance(row, Mapping)]
    if not rows:
        return "## Measured\n\nNothing was measured."
    table = [
        f"| | {metric} (95 % interval) | rows | p50 latency | peak memory | size |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    parts = ["## Measured", "All on the same held-out rows, in the same run.", "\n".join(table)]
    if isinstance(report.get("retention"), int | float):
        parts.append(f"Kept of the teacher's {metric}: {100 * report['retention']:.1f} %.")
    parts += _gates(report.get("gates") or [])
    if report.get("verdict"):
        parts.append(str(report["verdict"]))
    if report.get("calibration_in_words"):
        parts.append(str(report["calibration_in_words"]))
    return "\n\n".join(parts)


def _table_row(name: str, measured: Mapping[str, Any]) -> str:
    score = measured.get("score")
    score = score if isinstance(score, Mapping) else {"value": score} if isinstance(score, int | float) else {}
    latency = (measured.get("latency_ms") or {}).get("p50")
    cells = [
        name,
        _score(score),
        f"{score['rows']:,}" if score.get("rows") else "",
        f"{latency:.3g} ms" if latency is not None else "",
        _megabytes(memory) if (memory := measured.get("memory_bytes_peak")) else "",
        _megabytes(size) if (size := measured.get("size_bytes")) else "",
    ]
    return "| " + " | ".join(cells) + " |"


def _score(score: Mapping[str, Any]) -> str:
    if score.get("value") is None:
        return ""
    interval = score.get("ci95")
    return f"{score['value']:.4f}" + (f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval else "")


def _gates(gates: Iterable[Mapping[str, Any]]) -> list[str]:
    lines = [
        f"- {gate.get('name')}: {gate.get('value')} (limit {gate.get('limit')}): "
        f"{'held' if gate.get('passed') else 'NOT held'}"
        for gate in gates
    ]
    return ["Gates:", "\n".join(lines)] if lines else []


def _limits(description: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    limits = ["The numbers hold for text like the held-out rows; other text was not measured."]
    if description.get("form") == "classifier":
        limits.append("It always answers with one of its labels, also to text that fits none: look at the confidence.")
        if description.get("max_tokens"):
            limits.append(f"Only the first {description['max_tokens']} tokens of a text are read.")
    else:
        limits.append("It can write what is not true. Check answers before anything depends on them.")
        if description.get("max_tokens"):
            limits.append(f"Conversation and answer together hold at most {description['max_tokens']} tokens.")
    failed = [str(gate.get("name")) for gate in report.get("gates") or [] if not gate.get("passed")]
    if failed:
        limits.append(f"Gates that did not hold: {', '.join(failed)}.")
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _origin(recipe: Mapping[str, Any], lineage: Mapping[str, Any]) -> str:
    lines = []
    base = base_model(recipe, lineage)
    if base:
        lines.append(f"- Base model: {base}")
    for role, value in lineage.items():
        if role == "base_model":
            continue
        digest = value.get("digest") if isinstance(value, Mapping) else value
        what = "Training data" if role == "dataset" else role.replace("_", " ").capitalize()
        lines.append(f"- {what}: `{digest}`")
    return "## Where it comes from\n\n" + "\n".join(lines) if lines else ""


def _licences(licenses: Mapping[str, str]) -> str:
    if not licenses:
        return "## Licences\n\nNone were given. Ask before you pass this on."
    lines = [
        f"- {name}: `licenses/{name}.txt` ({license_id(text) or 'see the text'})" for name, text in licenses.items()
    ]
    return "## Licences\n\n" + "\n".join(lines)


def _how_to_run(description: Mapping[str, Any], name: str) -> str:
    api = (
        'curl http://127.0.0.1:8000/v1/classify -H "Content-Type: application/json" -d \'{"input": "..."}\''
        if description.get("form") == "classifier"
        else 'curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\\n'
        f'  -d \'{{"model": "{name}", "messages": [{{"role": "user", "content": "..."}}]}}\''
    )
    return f"## How to run it\n\n```sh\nslmops verify .\nslmops chat .\nslmops serve .\n{api}\n```"


def _megabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.1f} MB"
