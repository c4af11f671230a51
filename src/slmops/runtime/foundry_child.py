"""Foundry Local in a process of its own: run by path, under an interpreter that has ``foundry-local-sdk``.

Nothing of slmops is imported here: that interpreter need not have it. One JSON object comes in as the first line of
standard input; one goes out when the model is loaded and its web service listens; the end of standard input ends the
process, so that it never outlives whoever started it, not even one that was killed.

::

    in    {"model": folder, "id": "name:1", "name", "data": folder, "port"}
    out   {"url", "id", "version", "models": [id, ...]}, or {"error"}
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from typing import Any

NOWHERE = "http://127.0.0.1:9/asset-gallery/v1.0/models"
"""In place of the public catalog, which lies in the cloud."""


def main() -> int:
    """Serve until standard input ends."""
    asked = json.loads(sys.stdin.readline())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the library prints its log to standard output, which is the parent's
    try:
        manager, told = serve(asked)
    except Exception as error:  # noqa: BLE001 (told to the parent, which raises it)
        told = {"error": f"{type(error).__name__}: {error}"}
        manager = None
    answers.write(json.dumps(told) + "\n")
    answers.flush()
    if manager is None:
        return 1
    sys.stdin.read()
    manager.close()
    return 0


def serve(asked: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The manager, with the model loaded and its service started; and what the parent is told."""
    from foundry_local_sdk import Configuration, FoundryLocalManager, LogLevel
    from foundry_local_sdk.catalog import CatalogType
    from foundry_local_sdk.model_info import ModelInfoBuilder

    configuration = Configuration(
        app_name="slmops",
        app_data_dir=f"{asked['data']}/data",
        model_cache_dir=f"{asked['data']}/models",
        logs_dir=f"{asked['data']}/logs",
        log_level=LogLevel.WARNING,
        web=Configuration.WebService(urls=f"http://127.0.0.1:{asked['port']}"),
        catalog_urls=[(NOWHERE, None)],
        disable_nonessential_telemetry=True,
    )
    FoundryLocalManager.initialize(configuration)
    manager: Any = FoundryLocalManager.instance
    catalog = manager.get_catalog(CatalogType.LOCAL)
    if catalog.get_model_variant(asked["id"]) is not None:  # registrations outlive the process
        catalog.unregister_model(asked["id"])
    with ModelInfoBuilder() as about:
        about.set_string_property("task", "chat-completion")
        about.set_string_property("display_name", asked["name"])
        model = catalog.register_model(asked["model"], asked["id"], about)
    model.load()
    manager.start_web_service()
    models = sorted(one.id for one in catalog.list_models())
    return manager, {
        "url": manager.urls[0],
        "id": model.id,
        "version": version("foundry-local-sdk"),
        "models": models,
    }


if __name__ == "__main__":
    sys.exit(main())
