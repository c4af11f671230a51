"""Forms on which people rate answers without knowing whose they are.

``pairs``   two answers side by side: the left one is better, both are alike, the right one is better
``scores``  one answer at a time, from 1 to 5

A form is a page that works offline in any browser and saves a file, and the same items as csv and jsonl for those who
would rather use a spreadsheet. Which answer is whose lies in a file of its own, the key.

Guarantees: equal answers, models and seed give the same form; sides and order are drawn with the seed; nothing in the
form tells the models apart but their answers. Not covered: answers that name their model themselves.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from slmops.artifacts import Row
from slmops.trust import digest_json

FormKind = Literal["pairs", "scores"]
FORM_KINDS: tuple[FormKind, ...] = ("pairs", "scores")
SCHEMA = 1
SIDES = ("left", "right")
PREFERENCES = ("left", "same", "right")
SCORES = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Item:
    """What is shown at once. ``answers``: two for a pair, one for a score; ``models``: whose they are, by number."""

    id: str
    row: str
    prompt: str
    answers: tuple[str, ...]
    models: tuple[int, ...]

    def shown(self) -> dict[str, Any]:
        """What a rater may see."""
        return {"item": self.id, "prompt": self.prompt, "answers": list(self.answers)}


@dataclass(frozen=True)
class RatingForm:
    """``models``: their names, the one that is asked about first, the one that it is compared with second."""

    kind: FormKind
    models: tuple[str, ...]
    items: tuple[Item, ...]

    @property
    def id(self) -> str:
        """Of what is shown, so that ratings are never read with another form's key."""
        return digest_json([self.kind, [item.shown() for item in self.items]])[:16]

    def key(self) -> dict[str, Any]:
        """Which answer is whose."""
        return {
            "schema": SCHEMA,
            "form": self.id,
            "kind": self.kind,
            "models": list(self.models),
            "items": {item.id: {"row": item.row, "models": list(item.models)} for item in self.items},
        }


def make_form(kind: FormKind, rows: Sequence[Row], answers: Mapping[str, Sequence[str]], *, seed: int) -> RatingForm:
    """``answers``: name of a model -> its answer to each of ``rows``; two models for ``pairs``, one or two for
    ``scores``.

    Raises:
        ValueError: another number of models, or not one answer a row.
    """
    names = tuple(answers)
    if len(names) != 2 and not (kind == "scores" and len(names) == 1):
        raise ValueError(f"{len(names)} models cannot be rated as {kind}")
    if any(len(given) != len(rows) for given in answers.values()):
        raise ValueError("one answer a row is needed")
    drawn = random.Random(seed)
    shown = [(index, sides) for index in range(len(rows)) for sides in _sides(kind, len(names), drawn)]
    drawn.shuffle(shown)
    items = [
        Item(
            f"q{number:03}",
            rows[index].id,
            prompt_of(rows[index]),
            tuple(answers[names[model]][index] for model in sides),
            sides,
        )
        for number, (index, sides) in enumerate(shown, start=1)
    ]
    return RatingForm(kind, names, tuple(items))


def _sides(kind: FormKind, models: int, drawn: random.Random) -> list[tuple[int, ...]]:
    """Which models an item shows, from left to right: one item of both, or one of each."""
    if kind == "pairs":
        return [(0, 1) if drawn.random() < 0.5 else (1, 0)]
    return [(model,) for model in range(models)]


def prompt_of(row: Row) -> str:
    """The conversation as a person reads it; roles where there is more than one turn."""
    if len(row.messages) == 1:
        return row.text
    return "\n\n".join(f"{message.role}: {message.content}" for message in row.messages)


def write_form(form: RatingForm, page: Path) -> list[Path]:
    """Write the page, the same as csv and jsonl, and the key, all beside one another; the files written."""
    stem = page.with_suffix("")
    written = {
        page: render_page(form),
        stem.with_suffix(".csv"): as_csv(form),
        stem.with_suffix(".jsonl"): as_jsonl(form),
        stem.with_suffix(".key.json"): json.dumps(form.key(), ensure_ascii=False, indent=1),
    }
    page.parent.mkdir(parents=True, exist_ok=True)
    for path, text in written.items():
        path.write_text(text, "utf-8")
    return list(written)


def render_page(form: RatingForm) -> str:
    """The page: no address outside it, and what comes from data is never read as markup."""
    content = {"schema": SCHEMA, "form": form.id, "kind": form.kind, "items": [item.shown() for item in form.items]}
    # "<" as \u003c: nothing in an answer can end the element that holds it.
    data = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("form.html.jinja").render(data=data, kind=form.kind, items=len(form.items))


def as_csv(form: RatingForm) -> str:
    """A table with an empty column ``rating``: left, same or right; or 1 to 5."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    answers = SIDES if form.kind == "pairs" else ("answer",)
    writer.writerow(["form", "item", "prompt", *answers, "rating", "comment"])
    writer.writerows([form.id, item.id, item.prompt, *item.answers, "", ""] for item in form.items)
    return file.getvalue()


def as_jsonl(form: RatingForm) -> str:
    """One item a line, ``rating`` null."""
    lines = ({"form": form.id, **item.shown(), "rating": None, "comment": ""} for item in form.items)
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
