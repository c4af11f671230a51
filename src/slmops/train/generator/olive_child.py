"""The child process that runs Olive's LoRA or QLoRA: ``python -m slmops.train.generator.olive_child REQUEST.json``.

The request: ``{"model", "train_rows", "validation_rows", "output", "pass": "LoRA" | "QLoRA", "options": {...}}``; rows
are jsonl with ``input_ids`` and ``labels``. Exit code 0 says only that Olive came to its end: the caller looks at what
was written.

Nothing leaves the machine: Olive sends a heartbeat before it reads ``OLIVE_DISABLE_TELEMETRY``, so the sending itself
is taken out before anything of it runs, and a connection to anywhere else is refused whoever asks for it.
"""

from __future__ import annotations

import ipaddress
import json
import sys
from pathlib import Path
from typing import Any

REFUSED = "olive wanted to reach"


def stay_here() -> None:
    """From now on this process reaches this machine only. Irrevocable, as audit hooks are."""

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.getaddrinfo":
            host = arguments[0]
        elif event == "socket.connect" and isinstance(arguments[1], tuple):
            host = arguments[1][0]
        else:
            return
        if not _is_here(host):
            sys.stderr.write(f"{REFUSED} {host}\n")
            raise ConnectionRefusedError(f"{host} is not this machine")

    sys.addaudithook(refuse)


def _is_here(host: Any) -> bool:
    if host in (None, "", "localhost", b"localhost"):
        return True
    try:
        return ipaddress.ip_address(host if isinstance(host, str) else host.decode()).is_loopback
    except ValueError:
        return False


def silence() -> None:
    """Make Olive's telemetry do nothing, before its first object is made."""
    from olive.telemetry.telemetry import Telemetry

    def nothing(self: Any, *_: Any, **__: Any) -> None:
        return None

    for name in ("_log_heartbeat", "_create_logger", "_setup_payload_callbacks", "log"):
        if hasattr(Telemetry, name):
            setattr(Telemetry, name, nothing)


def main(arguments: list[str]) -> None:
    stay_here()
    request = json.loads(Path(arguments[0]).read_text("utf-8"))
    silence()
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
