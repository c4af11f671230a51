"""Artifacts by key on disk, an index over them, and the lineage between them.

Importing this is cheap; the database library is loaded by :meth:`Store.open`.
"""

from slmops.store.code import code_version
from slmops.store.lineage import Edge, Lineage, Node
from slmops.store.records import Run
from slmops.store.store import DEFAULT_STORE, STORE_VARIABLE, StageResult, Store, stage_key

__all__ = [
    "DEFAULT_STORE",
    "STORE_VARIABLE",
    "Edge",
    "Lineage",
    "Node",
    "Run",
    "StageResult",
    "Store",
    "code_version",
    "stage_key",
]
