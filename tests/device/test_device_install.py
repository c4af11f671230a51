"""The device size of the installation: in an empty environment, what is absent, what works, how large it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes.tiny_models import LABELS, tiny_tokenizer, write_tiny_generator, write_tiny_llama
from skipping import skip_or_fail
from slmops.artifacts import Bundle, Variant, drafting
from slmops.evaluate.bench import read_bench
from slmops.package import build_bundle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # installing takes minutes on a busy machine

ABSENT = (
    "torch",
    "transformers",
    "fastapi",
    "uvicorn",
    "sqlalchemy",
    "openai",
    "datasets",
    "sklearn",
    "pandas",
    "onnx",
)
LARGEST_MB = 400
REPORT: dict[str, Any] = {"name": "tiny", "metric": "accuracy", "student": {}, "verdict": "Made for a test."}

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def device(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with slmops alone, as ``pip install slmops`` gives it."""
    place = tmp_path_factory.mktemp("device") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    command = [place / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--constraint", repository / "constraints.txt", str(repository)], capture_output=True, text=True
    )
    if done.returncode and "Could not find a version" in done.stderr:
        skip_or_fail("a package index that pip can reach")
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(scope="module")
def run(device: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a program of that environment, with nothing of this one around it."""
    home = tmp_path_factory.mktemp("home")

    def call(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        environment = {"HOME": str(home), "PATH": f"{device / 'bin'}:/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
        command = [device / "bin" / program, *map(str, arguments)]
        return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=300)

    return call


@pytest.fixture(scope="module")
def classifier_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, through the real stages compress and package."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    from slmops.compress import export_classifier
    from slmops.models.classifier import PooledClassifier, save_classifier

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=64,
    )
    config.is_causal = False
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    save_classifier(PooledClassifier(LlamaModel(config), LABELS), checkpoint)
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    with drafting("variant", folder / "variant") as draft:
        export_classifier(
            checkpoint, draft, precision="int8", task="classification", name="tiny-intents", max_tokens=64
        )
    return _bundled(folder)


@pytest.fixture(scope="module")
def generator_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generator")
    write_tiny_llama(folder / "checkpoint")
    with drafting("variant", folder / "variant") as draft:
        write_tiny_generator(draft.path / "model", folder / "checkpoint")
    return _bundled(folder)


def _bundled(folder: Path) -> Path:
    variant = Variant.open(folder / "variant")
    with drafting("bundle", folder / "bundle", inputs={"variant": variant.digest}) as draft:
        recipe = {"name": "tiny", "task": variant.description["task"]}
        build_bundle(
            variant=variant,
            report=REPORT,
            recipe=recipe,
            licenses={"base-model": "Random weights, made for a test.\n"},
            lineage={},
            draft=draft,
        )
    return Bundle.open(folder / "bundle").path


def test_what_is_absent(run: Run) -> None:
    code = f"from importlib.util import find_spec; print(*[name for name in {ABSENT} if find_spec(name)])"
    assert run("python", "-c", code).stdout.split() == []


def test_how_large_it_is(device: Path, record_property: Callable[[str, object], None]) -> None:
    packages = next((device / "lib").glob("python3.*/site-packages"))
    sizes = {
        place.name: _size_bytes(place) for place in packages.iterdir() if not place.name.startswith(("pip", "setup"))
    }
    total_mb = sum(sizes.values()) / 1e6
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:5]
    told = f"{total_mb:.0f} MB: " + ", ".join(f"{name} {sizes[name] / 1e6:.0f}" for name in largest)
    record_property("device_size_mb", round(total_mb, 1))
    record_property("device_size", told)
    assert total_mb < LARGEST_MB, told


def _size_bytes(place: Path) -> int:
    return sum(path.stat().st_size for path in _files(place) if not path.is_symlink())


def _files(place: Path) -> Iterator[Path]:
    return (path for path in ([place] if place.is_file() else place.rglob("*")) if path.is_file())


def test_help_and_doctor(run: Run) -> None:
    shown = run("slmops", "--help")
    assert shown.returncode == 0
    assert "verify" in shown.stdout
    examined = run("slmops", "doctor", "--json")
    assert examined.returncode == 0, examined.stdout + examined.stderr
    checks = {check["name"]: check for check in json.loads(examined.stdout)["checks"]}
    assert checks["slmops"]["status"] == "ok"
    assert checks["slmops[train]"]["status"] == "warn"
    assert checks["telemetry"]["status"] == "ok"


def test_init_writes_a_recipe(run: Run, tmp_path: Path) -> None:
    assert run("slmops", "init", "--out", tmp_path / "recipe.yaml").returncode == 0
    assert "sample:support" in (tmp_path / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("verb", "extra"), [("serve", "serve"), ("run", "train"), ("data", "train"), ("compress", "train")]
)
def test_verbs_of_larger_sizes_say_what_to_install(
    run: Run, verb: str, extra: str, classifier_bundle: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{name: a, task: classification, data: {train: sample:support, target: '{intent}'}}")
    ended = run("slmops", verb, classifier_bundle if verb == "serve" else recipe)
    assert ended.returncode == 2, ended.stderr
    assert f"pip install 'slmops[{extra}]'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_classifier_answers(run: Run, classifier_bundle: Path) -> None:
    checked = run("slmops", "verify", classifier_bundle, "--json")
    assert json.loads(checked.stdout) == {"bundle": str(classifier_bundle), "ok": True, "problems": []}, checked.stderr
    asked = run("slmops", "chat", classifier_bundle, "--prompt", "my card is lost", "--json")
    answer = json.loads(asked.stdout)
    assert answer["label"] in LABELS
    assert sum(answer["probabilities"].values()) <= 1 + 1e-6


def test_a_generator_answers(run: Run, generator_bundle: Path) -> None:
    checked = run("slmops", "verify", generator_bundle, "--json")
    assert json.loads(checked.stdout)["ok"], checked.stdout + checked.stderr
    asked = run("slmops", "chat", generator_bundle, "--prompt", "hello", "--max-tokens", "8", "--json")
    answer = json.loads(asked.stdout)
    assert 1 <= answer["completion_tokens"] <= 8


@pytest.mark.parametrize("form", ["classifier", "generator"])
def test_a_bundle_is_measured_and_the_report_comes_back(
    run: Run, form: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """On the device, with its limits and estimates; read here by the reader of reports, drawn there."""
    bundle = request.getfixturevalue(f"{form}_bundle")
    out, page = tmp_path / "report.json", tmp_path / "page.html"
    options = ["--quick", "--lengths", "4,8", "--device", "phone"]
    done = run("slmops", "bench", bundle, *options, "--out", out, "--html", page)
    assert done.returncode == 0, done.stdout + done.stderr
    report = read_bench(out)
    [model] = report["models"]
    assert model["form"] == form
    assert model["digest"] == Bundle.open(bundle).digest
    assert model["latency_ms"]["p50"] > 0
    assert model["on_device"]["device"] == "phone"
    assert model["memory"]["peak_bytes"] < 200e6
    assert set(report["engines"].values()) == {None}
    assert "slmops bench" in page.read_text("utf-8")
    both = run("slmops", "bench", "--compare", out, out)
    assert both.returncode == 0, both.stderr
    refused = run("slmops", "bench", bundle, "--peer", "transformers=/nowhere")
    assert refused.returncode == 2
    assert "transformers is not installed" in refused.stderr


def test_damage_is_named(run: Run, classifier_bundle: Path, tmp_path: Path) -> None:
    import shutil

    damaged = tmp_path / "bundle"
    shutil.copytree(classifier_bundle, damaged)
    model = damaged / "model" / "model.onnx"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    os.chmod(model, 0o644)  # noqa: PTH101
    model.write_bytes(content)
    ended = run("slmops", "chat", damaged, "--prompt", "hello")
    assert ended.returncode == 1
    assert "model.onnx" in ended.stderr


def test_nothing_heavy_is_loaded_to_answer(run: Run, classifier_bundle: Path) -> None:
    """The modules of a process that classified one text: those of the device size, and no more."""
    code = (
        "import sys; from pathlib import Path; from slmops.runtime import open_classifier;"
        f"open_classifier(Path({str(classifier_bundle / 'model')!r})).probabilities(['a']);"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    loaded = set(run("python", "-c", code).stdout.split())
    assert {"numpy", "onnxruntime", "tokenizers"} <= loaded
    assert not loaded & {"onnxruntime_genai", "typer", "rich", *ABSENT}
