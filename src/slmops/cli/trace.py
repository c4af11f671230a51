"""``slmops trace``: what an artifact was made from, and what was made of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.tree import Tree

    from slmops.store import Edge, Lineage, Node, Store

_METRICS_SHOWN = 4


def trace(
    artifact: str = typer.Argument(help="A directory, or the first digits of a digest or key."),
    store: Path = typer.Option(Path(".slmops"), "--store", envvar="SLMOPS_STORE", help="Where artifacts are kept."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object on standard output."),
) -> None:
    """Show what an artifact was made from, and what was made of it."""
    from slmops.cli.render import print_json

    with _open(store) as opened:
        lineage = opened.trace(opened.find(artifact))
    if as_json:
        print_json(lineage.to_json())
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for tree in lineage_trees(lineage):
        console.print(tree)


def _open(root: Path) -> Store:
    """For looking only, a store need be neither there nor writable: an artifact that is named by path tells its own."""
    from slmops.store import Store

    return Store.open(root, read_only=not root.is_dir() or not os.access(root, os.W_OK))


def lineage_trees(lineage: Lineage) -> list[Tree]:
    """The graph as trees for a terminal: the artifact with its inputs, then with its uses. A node that comes again is
    not unfolded again."""
    from rich.tree import Tree

    root = lineage.nodes[lineage.root]
    upward = Tree(_line(root))
    made_from = upward.add("[dim]made from[/]") if lineage.inputs_of(root.id) else None
    if made_from is not None:
        _grow(made_from, lineage, root.id, lineage.inputs_of, lambda edge: edge.maker, set())
    used_in = upward.add("[dim]used in[/]") if lineage.uses_of(root.id) else None
    if used_in is not None:
        _grow(used_in, lineage, root.id, lineage.uses_of, lambda edge: edge.made, set())
    return [upward]


def _grow(
    tree: Tree,
    lineage: Lineage,
    node_id: str,
    edges_at: Callable[[str], list[Edge]],
    far_end: Callable[[Edge], str],
    unfolded: set[str],
) -> None:
    for edge in edges_at(node_id):
        below = far_end(edge)
        again = below in unfolded and bool(edges_at(below))
        branch = tree.add(_line(lineage.nodes[below], role=edge.role) + (" [dim](as above)[/]" if again else ""))
        if not again:
            unfolded.add(below)
            _grow(branch, lineage, below, edges_at, far_end, unfolded)


def _line(node: Node, role: str = "") -> str:
    from rich.markup import escape

    parts = [f"[bold]{escape(node.kind)}[/]", f"[cyan]{node.digest[:12]}[/]", escape(node.name)]
    if role and role != node.name:
        parts.insert(0, f"[dim]{escape(role)}:[/]")
    if node.created_at:
        parts.append(f"[dim]{escape(node.created_at[:16].replace('T', ' '))}[/]")
    if node.wall_s:
        parts.append(f"[dim]{node.wall_s:,.1f} s[/]")
    parts.append(escape(key_metrics(node.metrics)))
    return " ".join(part for part in parts if part)


def key_metrics(metrics: Mapping[str, Any]) -> str:
    """The first few metrics that fit on a line: numbers, and short texts."""
    shown = []
    for name, value in metrics.items():
        if isinstance(value, int | float) or (isinstance(value, str) and len(value) <= 24):
            shown.append(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}")
    return ", ".join(shown[:_METRICS_SHOWN])
