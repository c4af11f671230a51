from __future__ import annotations

import pytest

from slmops.data.templates import MissingValueError, parse_template, to_text
from slmops.errors import RecipeError


@pytest.mark.parametrize(
    ("source", "values", "expected"),
    [
        ("{text}", {"text": "hello"}, "hello"),
        ("Premise: {premise}\nHypothesis: {h}", {"premise": "a", "h": "b"}, "Premise: a\nHypothesis: b"),
        ("{userInput.text}!", {"userInput": {"text": "hi"}}, "hi!"),
        ("{a.b}", {"a.b": "flat", "a": {"b": "deep"}}, "flat"),
        ("{{{text}}}", {"text": "x"}, "{x}"),
        ("{{}} {Customer text}", {"Customer text": "y"}, "{} y"),
        ("{labels|[]}", {"text": "x"}, "[]"),
        ("{labels|}!", {"labels": None}, "!"),
        ("no column", {}, "no column"),
    ],
)
def test_renders(source: str, values: dict[str, object], expected: str) -> None:
    assert parse_template(source).render(values) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, "true"),
        (False, "false"),
        ("True", "True"),
        (3, "3"),
        (2.5, "2.5"),
        (float("nan"), None),
        (None, None),
        ("  ", None),
        ([{"slot": "é"}], '[{"slot": "é"}]'),
    ],
)
def test_values_as_text(value: object, expected: str | None) -> None:
    assert to_text(value) == expected


@pytest.mark.parametrize(
    ("values", "reason"),
    [({}, "column text is missing"), ({"text": " "}, "column text is empty"), ({"text": b"x"}, "binary")],
)
def test_missing_values_say_which_column(values: dict[str, object], reason: str) -> None:
    with pytest.raises(MissingValueError, match=reason):
        parse_template("{text}").render(values)


@pytest.mark.parametrize("source", ["{", "text}", "{}", "{a{b}}", "{ }"])
def test_lone_braces_are_errors_with_the_key_and_the_remedy(source: str) -> None:
    with pytest.raises(RecipeError, match=r"data\.target.*names no column.*\{\{"):
        parse_template(source, key="data.target")


def test_required_columns_are_named_once_in_order() -> None:
    assert parse_template("{b} {a} {b|x}").required == ("b", "a")
