"""A version of the code that does a stage's work, so that a changed stage is done again.

Guarantees: the digest changes when a statement of the named packages changes; it does not change with comments,
formatting, line numbers, or docstrings. Not covered: the libraries below, and modules that are not named. Syntax trees
differ a little between minor versions of Python, so another Python does the work again.
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
    """``"<slmops version>+<16 hex digits>"`` over all Python files and templates of the named modules and packages.

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
    spec = find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    if spec.submodule_search_locations is None:
        return [(name, Path(str(spec.origin)))]
    return [
        (f"{name}/{path.relative_to(root).as_posix()}", path)
        for root in map(Path, spec.submodule_search_locations)
        for path in root.rglob("*")
        if path.suffix in {".py", *DATA_SUFFIXES}
    ]


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
