"""The things that stages read and write: small frozen types, versioned on disk."""

from slmops.artifacts.base import Artifact, Draft, drafting
from slmops.artifacts.kinds import (
    KINDS,
    MODEL_DESCRIPTION,
    ROWS_NAME,
    SPLITS,
    Bundle,
    Checkpoint,
    Curated,
    Dataset,
    Report,
    Signals,
    Variant,
    open_artifact,
    read_jsonl,
)
from slmops.artifacts.manifest import MANIFEST_NAME, Manifest
from slmops.artifacts.rows import ChatRole, Message, Row, ToolCall

__all__ = [
    "KINDS",
    "MANIFEST_NAME",
    "MODEL_DESCRIPTION",
    "ROWS_NAME",
    "SPLITS",
    "Artifact",
    "Bundle",
    "ChatRole",
    "Checkpoint",
    "Curated",
    "Dataset",
    "Draft",
    "Manifest",
    "Message",
    "Report",
    "Row",
    "Signals",
    "ToolCall",
    "Variant",
    "drafting",
    "open_artifact",
    "read_jsonl",
]
