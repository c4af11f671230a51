"""The child process that runs Olive's LoRA or QLoRA: ``python -m slmops.train.generator.olive_child REQUEST.json``.

The request: ``{"model", "train_rows", "validation_rows", "output", "pass": "LoRA" | "QLoRA", "options": {...}}``; rows
are jsonl with ``input_ids`` and ``labels``. Exit code 0 says only that Olive came to its end: the caller looks at what
was written.

Nothing leaves the machine: Olive sends a heartbeat before it reads ``OLIVE_DISABLE_TELEMETRY``, so the sending itself
is taken out before anything of it runs, and a connection to anywhere else is refused whoever asks for it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from slmops.models.confined import silence_olive, stay_here


def main(arguments: list[str]) -> None:
    stay_here()
    request = json.loads(Path(arguments[0]).read_text("utf-8"))
    silence_olive()
    from olive.data.registry import Registry

    @Registry.register_dataset("slmops_rows")  # type: ignore[untyped-decorator]
    def rows(path: str, **_: Any) -> list[dict[str, list[int]]]:
        with Path(path).open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    from olive.workflows import run

    run(workflow(request))


def workflow(request: dict[str, Any]) -> dict[str, Any]:
    """What Olive is asked to do. Pure."""

    def data(name: str, path: str) -> dict[str, Any]:
        return {
            "name": name,
            "type": "DataContainer",
            "load_dataset_config": {"type": "slmops_rows", "params": {"path": path}},
            "pre_process_data_config": {"type": "skip_pre_process"},
        }

    return {
        "input_model": {"type": "HfModel", "model_path": request["model"], "task": "text-generation"},
        "systems": {
            "here": {
                "type": "LocalSystem",
                "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
            }
        },
        "host": "here",
        "target": "here",
        "data_configs": [
            data("train_rows", request["train_rows"]),
            data("validation_rows", request["validation_rows"]),
        ],
        "passes": {
            "finetune": {
                "type": request["pass"],
                "train_data_config": "train_rows",
                "eval_data_config": "validation_rows",
                **request["options"],
            }
        },
        "output_dir": request["output"],
        "cache_dir": str(Path(request["output"]).with_name("cache")),
        "no_artifacts": True,
        "evaluate_input_model": False,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
