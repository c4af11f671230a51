"""``python -m benchmarks NAME [--quick]`` prints one JSON object on its last line; ``--list`` names them all."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
from pathlib import Path

import benchmarks
from slmops.evaluate.machine import machine_facts

SHARED = {"__main__", "common", "random_weights", "streaming", "bare_child", "served", "trained"}


def names() -> list[str]:
    """Every module of this package is a benchmark, but for the shared parts."""
    return sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__) if module.name not in SHARED)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", choices=names(), metavar="NAME", help=", ".join(names()))
    parser.add_argument("--list", action="store_true", help="names, one a line, with what they compare")
    parser.add_argument("--quick", action="store_true", help="a look in under a minute, on less work")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real data sets")
    parser.add_argument(
        "--store", type=Path, default=Path(".slmops/benchmarks"), help="where runs are kept and resumed"
    )
    parser.add_argument(
        "--random-weights",
        nargs="?",
        const="",
        metavar="TOKENIZER_FOLDER",
        help="a fresh model of the same configuration, where the real weights cannot be had: speed and memory alone",
    )
    options = parser.parse_args()
    if options.list or options.name is None:
        for name in names():
            purpose = (importlib.import_module(f"benchmarks.{name}").__doc__ or "").strip().splitlines()[0]
            print(f"{name:22} {purpose}")
        return 0
    module = importlib.import_module(f"benchmarks.{options.name}")
    if options.random_weights is not None and not getattr(module, "RANDOM_WEIGHTS", False):
        parser.error(f"{options.name} needs real weights: leave --random-weights out")
    result = module.run(options)
    print(json.dumps({"name": options.name, **result, "machine": machine_facts()}, ensure_ascii=False))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
