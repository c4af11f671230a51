"""The code's version changes with what the code does, and with nothing else."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

from slmops import __version__
from slmops.store import code_version

BASE = '''"""Module."""
LIMIT = 3
"""Attribute."""

def work(x: int) -> int:
    """Docstring."""
    return x + LIMIT
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "verymuchstage"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "work.py").write_text(BASE)
    (folder / "inner" / "__init__.py").write_text("X = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return folder


def version_after(package: Path, text: str) -> str:
    path = package / "work.py"
    path.write_text(text)
    os.utime(path, ns=(0, int.from_bytes(os.urandom(6), "big")))  # two edits within one tick of the clock
    return code_version("verymuchstage")


@pytest.mark.parametrize(
    "text",
    [
        BASE.replace("Docstring.", "Another docstring."),
        BASE.replace('    """Docstring."""\n', ""),
        BASE.replace("Module.", "x").replace("Attribute.", "y"),
        BASE.replace("return x + LIMIT", "return (x +\n        LIMIT)  # why"),
        "# a comment\n\n\n" + BASE,
        BASE.replace("    ", "\t"),
    ],
)
def test_words_and_form_do_not_count(package: Path, text: str) -> None:
    assert version_after(package, text) == version_after(package, BASE)


@pytest.mark.parametrize(
    "text",
    [
        BASE.replace("x + LIMIT", "x - LIMIT"),
        BASE.replace("LIMIT = 3", "LIMIT = 4"),
        BASE.replace("x: int", "x: float"),
        BASE + "MORE = 'text'\n",
        BASE.replace("return x + LIMIT", "return 'Docstring.'"),
    ],
)
def test_what_the_code_does_counts(package: Path, text: str) -> None:
    assert version_after(package, text) != version_after(package, BASE)


def test_files_below_and_names_of_files_count(package: Path) -> None:
    first = code_version("verymuchstage")
    (package / "inner" / "more.py").write_text("")
    second = code_version("verymuchstage")
    (package / "inner" / "more.py").rename(package / "inner" / "other.py")
    assert len({first, second, code_version("verymuchstage")}) == 3


def test_a_module_alone_and_several_names(package: Path) -> None:
    one = code_version("verymuchstage.work")
    (package / "inner" / "__init__.py").write_text("X = 22\n")
    assert code_version("verymuchstage.work") == one
    assert code_version("verymuchstage.work", "verymuchstage.inner") == code_version(
        "verymuchstage.inner", "verymuchstage.work"
    )
    assert one.startswith(f"{__version__}+")
    assert len(one) == len(__version__) + 1 + 16


def test_a_module_stands_for_what_it_imports_of_its_stage(package: Path) -> None:
    """Its neighbours that it does not use may change, and so may another stage."""
    stage = package / "inner"
    (stage / "loop.py").write_text("STEPS = 3\n")
    (stage / "student.py").write_text("from verymuchstage.inner import losses\nfrom verymuchstage.work import work\n")
    (stage / "losses.py").write_text("def loss():\n    import verymuchstage.inner.loop\n")
    (stage / "teacher.py").write_text("import json\n")
    names = ("verymuchstage.inner.student", "verymuchstage.inner.teacher")
    student, teacher = map(code_version, names)
    (stage / "loop.py").write_text("STEPS = 444\n")
    assert code_version(names[0]) != student
    assert code_version(names[1]) == teacher
    changed = code_version(names[0])
    (package / "work.py").write_text("X = 1\n")
    (stage / "teacher.py").write_text("import json, os\n")
    assert code_version(names[0]) == changed
    assert code_version(names[1]) != teacher


def test_an_unknown_module_is_a_mistake_of_ours() -> None:
    with pytest.raises(ModuleNotFoundError, match="slmops_no_such"):
        code_version("slmops_no_such")


def test_naming_a_stage_does_not_import_it(package: Path) -> None:
    import sys

    (package / "work.py").write_text("raise RuntimeError('imported')")
    assert code_version("verymuchstage.work")
    assert "verymuchstage.work" not in sys.modules
