"""Lineage: what an artifact was made from, down to the source files, and what was made of it.

Two questions, two rules. *From*: the artifact whose key was recorded when the work was done (or any with the same
contents, where that one is gone). *Of*: every artifact that read these contents; a stage whose input was made again
with the same bytes is not done again, so contents are what counts. Pure: the index is handed in as two functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slmops.store.records import Entry, Input

SOURCE, MISSING = "source", "missing"


@dataclass(frozen=True)
class Node:
    """An artifact, or a leaf. ``kind`` is the artifact's, ``source`` for a raw digest, or ``missing`` for an artifact
    that is no longer in the store. ``path`` is None for leaves."""

    id: str
    kind: str
    name: str
    digest: str
    path: str | None = None
    created_at: str = ""
    wall_s: float = 0.0
    size_bytes: int = 0
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "metrics": dict(self.metrics)}


@dataclass(frozen=True, order=True)
class Edge:
    """``maker`` was read in the ``role`` to make ``made``; both are ids of nodes."""

    maker: str
    made: str
    role: str

    def to_json(self) -> dict[str, str]:
        return {"from": self.maker, "to": self.made, "role": self.role}


@dataclass(frozen=True)
class Lineage:
    """A graph around one artifact. Edges hold only what lies above or below it."""

    root: str
    nodes: Mapping[str, Node]
    edges: tuple[Edge, ...]

    def inputs_of(self, node_id: str) -> list[Edge]:
        return [edge for edge in self.edges if edge.made == node_id]

    def uses_of(self, node_id: str) -> list[Edge]:
        return [edge for edge in self.edges if edge.maker == node_id]

    @property
    def ancestors(self) -> list[Node]:
        """All that the artifact was made from, nearest first."""
        return self._walk(lambda node_id: [edge.maker for edge in self.inputs_of(node_id)])

    @property
    def descendants(self) -> list[Node]:
        """All that was made of the artifact, nearest first."""
        return self._walk(lambda node_id: [edge.made for edge in self.uses_of(node_id)])

    @property
    def sources(self) -> list[Node]:
        return [node for node in self.ancestors if node.kind == SOURCE]

    def _walk(self, step: Callable[[str], list[str]]) -> list[Node]:
        seen, queue = {self.root}, [self.root]
        for node_id in queue:
            for following in step(node_id):
                if following not in seen:
                    seen.add(following)
                    queue.append(following)
        return [self.nodes[node_id] for node_id in queue[1:]]

    def to_json(self) -> dict[str, Any]:
        return {
            "artifact": self.root,
            "nodes": [node.to_json() for node in self.nodes.values()],
            "edges": [edge.to_json() for edge in self.edges],
            "ancestors": [node.id for node in self.ancestors],
            "descendants": [node.id for node in self.descendants],
        }


Lookup = Callable[[str], Sequence[Entry]]
Describe = Callable[[Entry], Mapping[str, Any]]


def entry_id(entry: Entry) -> str:
    return entry.key or entry.digest


def trace_lineage(root: Entry, *, with_digest: Lookup, made_from: Lookup, metrics_of: Describe) -> Lineage:
    """The graph around ``root``. ``with_digest``: artifacts of these contents; ``made_from``: those that read them."""
    nodes: dict[str, Node] = {}
    edges: dict[Edge, None] = {}

    def add(entry: Entry) -> Node:
        node = _node(entry, metrics_of(entry))
        return nodes.setdefault(node.id, node)

    def climb(entry: Entry) -> None:
        for used in entry.inputs:
            makers = _makers(used, with_digest(used.digest))
            for maker in makers:
                known = entry_id(maker) in nodes
                edges[Edge(add(maker).id, entry_id(entry), used.role)] = None
                if not known:
                    climb(maker)
            if not makers:
                leaf = _leaf(used)
                nodes.setdefault(leaf.id, leaf)
                edges[Edge(leaf.id, entry_id(entry), used.role)] = None

    def descend(entry: Entry) -> None:
        for user in made_from(entry.digest):
            if entry_id(user) in above:  # a stage that changed nothing reads and writes the same contents
                continue
            known = entry_id(user) in nodes
            add(user)
            for used in user.inputs:
                if used.digest == entry.digest:
                    edges[Edge(entry_id(entry), entry_id(user), used.role)] = None
            if not known and user.digest != entry.digest:
                descend(user)

    add(root)
    climb(root)
    above = set(nodes)
    descend(root)
    return Lineage(entry_id(root), nodes, tuple(edges))


def _makers(used: Input, candidates: Sequence[Entry]) -> list[Entry]:
    exact = [entry for entry in candidates if used.key and entry.key == used.key]
    return exact or list(candidates)


def _node(entry: Entry, metrics: Mapping[str, Any]) -> Node:
    return Node(
        id=entry_id(entry),
        kind=entry.kind,
        name=entry.name,
        digest=entry.digest,
        path=entry.path,
        created_at=entry.created_at,
        wall_s=entry.wall_s,
        size_bytes=entry.size_bytes,
        metrics=metrics,
    )


def _leaf(used: Input) -> Node:
    return Node(used.key or used.digest, MISSING if used.key else SOURCE, used.role, used.digest)
