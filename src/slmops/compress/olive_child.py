"""The child process that runs a workflow of Olive's: ``python -m slmops.compress.olive_child REQUEST.json``, where the
request is ``{"workflow": {...}, "result": path}``.

The result, ``{"type", "path"}`` of the model that the last pass wrote or ``null``, is what the caller looks at: Olive
ends with exit code 0 whether a pass failed or not. Nothing leaves the machine (:mod:`slmops.models.confined`).
Olive's pass ``ModelBuilder`` calls onnxruntime-genai's builder as it was some versions ago; :func:`fit_builder` stands
between them.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slmops.models.confined import silence_olive, stay_here

OLD_LOADER = "onnxruntime_genai.models.quantized_model"
"""A module of the builder that Olive's pass changes for checkpoints that are quantized already."""


def main(arguments: list[str]) -> None:
    stay_here()
    request = json.loads(Path(arguments[0]).read_text("utf-8"))
    silence_olive()
    fit_builder()
    from olive.workflows import run

    best = run(request["workflow"]).get_best_candidate()
    found = None if best is None else {"type": best.model_type, "path": str(best.model_path)}
    Path(request["result"]).write_text(json.dumps(found), "utf-8")


def fit_builder() -> None:
    """Let Olive's pass call the builder that is installed."""
    from olive.passes.onnx import model_builder
    from onnxruntime_genai.models import builder

    from slmops.compress.builder_child import as_the_builder_reads, mend

    original = builder.create_model
    mend(builder)

    def create_model(
        model_name: str,
        input_path: str,
        output_dir: str,
        precision: Any,
        execution_provider: str,
        cache_dir: str,
        **options: Any,
    ) -> Any:
        place = (
            model_name,
            input_path,
            output_dir,
            str(getattr(precision, "value", precision)),
            execution_provider,
            cache_dir,
        )
        if "hf_details" not in options:
            pairs = [f"{key}={value}" for key, value in {"hf_token": "false", **options}.items()]
            options = builder.parse_extra_options(*place, pairs)
            as_the_builder_reads(options["hf_details"]["hf_config"])
        return original(*place, **options)

    builder.create_model = create_model
    if find_spec(OLD_LOADER) is None:
        model_builder.ModelBuilder.maybe_patch_quant = staticmethod(lambda: None)


if __name__ == "__main__":
    main(sys.argv[1:])
