"""A version of the code that does a stage's work, so that a changed stage is done again.

Guarantees: the digest changes when a statement of the named code changes; it does not change with comments,
formatting, line numbers, or docstrings. A package stands for everything below it; a module for itself and for what it
imports, directly or not, of its own stage (``slmops.train.loop``: of ``slmops.train``). Not covered: the libraries
below, and other stages that are not named. Syntax trees differ a little between minor versions of Python, so another
Python does the work again.
"""

from __future__ import annotations

import ast
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from slmops import __version__
from slmops.trust import digest_bytes, digest_json

DATA_SUFFIXES = frozenset({".jinja", ".css", ".sql"})
"""Files beside the code that decide what it writes."""


def code_version(*names: str) -> str:
    """``"<slmops version>+<16 hex digits>"`` over the Python files and templates of the named modules and packages.

    None of them is imported.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    trees: dict[str, str] = {}
    for name in names:
        for module, path in _sources(name):
            status = path.stat()
            trees[module] = _tree_digest_of(path, status.st_mtime_ns, status.st_size)
    return f"{__version__}+{digest_json(trees)[:16]}"


def _sources(name: str) -> list[tuple[str, Path]]:
    path = _path_of(name)
    if path is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    if path.is_dir():
        return [
            (f"{name}/{below.relative_to(path).as_posix()}", below)
            for below in path.rglob("*")
            if below.suffix in {".py", *DATA_SUFFIXES}
        ]
    stage = ".".join(name.split(".")[:2]) + "."
    found = {name: path}
    waiting = [path]
    while waiting:
        status = (path := waiting.pop()).stat()
        for imported in _imports_of(path, status.st_mtime_ns, status.st_size):
            source = _path_of(imported) if imported.startswith(stage) and imported not in found else None
            if source is not None:
                found[imported] = source / "__init__.py" if source.is_dir() else source
                waiting.append(found[imported])
    return list(found.items())


def _path_of(name: str) -> Path | None:
    """The folder of a package or the file of a module; None where there is neither."""
    top, *below = name.split(".")
    spec = find_spec(top)
    if spec is None or spec.origin is None:
        return None
    if spec.submodule_search_locations is None:
        return None if below else Path(spec.origin)
    path = Path(spec.origin).parent.joinpath(*below)
    if (path / "__init__.py").is_file():
        return path
    file = path.with_name(f"{path.name}.py")
    return file if file.is_file() else None


@lru_cache(maxsize=4096)
def _imports_of(path: Path, mtime_ns: int, size_bytes: int) -> frozenset[str]:
    """Absolute names that may be modules: of ``from a import b`` both ``a`` and ``a.b``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes(), filename=str(path))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)


@lru_cache(maxsize=4096)
def _tree_digest_of(path: Path, mtime_ns: int, size_bytes: int) -> str:
    """``mtime_ns`` and ``size_bytes`` are there for the cache: an edited file is read again."""
    if path.suffix in DATA_SUFFIXES:
        return digest_bytes(path.read_bytes())
    tree = _WithoutDocstrings().visit(ast.parse(path.read_bytes(), filename=str(path)))
    return digest_bytes(ast.dump(tree).encode("utf-8", "surrogatepass"))


class _WithoutDocstrings(ast.NodeTransformer):
    """Drops statements that are a bare string: docstrings of modules, classes, functions and attributes."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return None
        return node
