"""The two comparisons with trl on a bare checkout: random weights, and nothing installed but what training needs."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.__main__ import names
from benchmarks.random_weights import SMOLLM2_135M, write_model

from benchmarks import common, distill_vs_trl, train_vs_trl
from slmops.chat import ChatTokenizer

ROOT = Path(__file__).resolve().parents[2]
TINY = SMOLLM2_135M | {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MISSING = (
    *("sqlalchemy", "alembic", "datasets", "gguf", "bitsandbytes", "onnxruntime", "onnxruntime_genai", "optuna"),
    *("openai", "fastapi", "typer", "math_verify", "rouge_score", "jsonschema", "py3langid", "sklearn", "onnxscript"),
)
TEXTS = ["where is my card", "I want a refund for the fee", "what is the balance of my account"]
CODE = """
import json, sys
sys.modules.update(dict.fromkeys({missing!r}))
from pathlib import Path
from benchmarks import train_vs_trl, distill_vs_trl
{work}
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data/banking77"
    folder.mkdir(parents=True)
    lines = [f"{text} {number},{text.split()[-1]}" for number in range(16) for text in TEXTS]
    (folder / "train.csv").write_text("text,category\n" + "\n".join(lines) + "\n")
    return tmp_path / "data"


def bare(work: str) -> str:
    """What ``work`` prints in a process that lacks :data:`MISSING`."""
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(missing=MISSING, work=work)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "src", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_a_random_model_is_one_that_is_trained(data: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "model", TEXTS, config=TINY)
    spec = {
        "data": str(data / "banking77/train.csv"),
        "model": str(tmp_path / "model"),
        "side": "ours",
        "seed": 0,
        "rows": 40,
        "validation_rows": 8,
        "precision": "fp32",
    }
    train_vs_trl_rank = "train_vs_trl.RANK, train_vs_trl.BATCH = 2, 8"
    found = json.loads(bare(f"{train_vs_trl_rank}\ntrain_vs_trl.main({spec!r})"))
    assert found["examples_per_s"] > 0
    assert found["memory_bytes_peak"] > 1e8
    assert 0 < found["validation_loss"] < 20


def test_a_student_is_distilled_without_the_rest_of_slmops(tmp_path: Path) -> None:
    teacher = write_model(tmp_path / "teacher", TEXTS, config=TINY)
    (tmp_path / "work").mkdir()
    work = f"""
rows = [({TEXTS[0]!r}, {TEXTS[1]!r})] * 12
teacher, place = Path({str(teacher)!r}), Path({str(tmp_path)!r})
distill_vs_trl.EPOCHS, distill_vs_trl.VOCABULARY = 1, 400
student = distill_vs_trl.cut(teacher, place / "student")
run = distill_vs_trl.timed("ours", teacher, student, rows[4:], rows[:4], place / "work", 4, 64, "fp32")
print(json.dumps(vars(run)))
"""
    run = json.loads(bare(work))
    assert run["seconds"] > 0
    assert 0 <= run["kl"] < 20


def test_the_result_says_what_was_measured(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = argparse.Namespace(quick=True, data=data, random_weights="")
    asked: list[str] = []

    def child(spec: dict[str, object]) -> dict[str, float]:
        asked.append(str(spec["side"]))
        assert (Path(str(spec["model"])) / "model.safetensors").is_file()
        return {"flops_per_s": 1.0, "examples_per_s": 2.0, "memory_bytes_peak": 3.0, "validation_loss": 4.0}

    monkeypatch.setattr(train_vs_trl, "child", child)
    monkeypatch.setattr(
        train_vs_trl, "write_model", lambda folder, texts, tokenizer: write_model(folder, texts, tokenizer, TINY)
    )
    found = train_vs_trl.run(options)
    assert asked == ["gemm", "ours", "trl"]
    assert found["weights"].startswith("random")
    assert found["device"] == common.device_name()
    runs = {who: [distill_vs_trl.Run(seconds, 1.0, kl)] for who, seconds, kl in (("ours", 1, 9), ("trl", 3, 1))}
    assert distill_vs_trl.compared(runs, judged_by_quality=False)["passed"]
    assert not distill_vs_trl.compared(runs, judged_by_quality=True)["passed"]


def test_the_tokenizer_of_a_folder_is_taken(tmp_path: Path) -> None:
    first = write_model(tmp_path / "first", TEXTS, config=TINY)
    second = write_model(tmp_path / "second", ["something else"], first, TINY)
    ids = [ChatTokenizer.load(folder).encode(TEXTS[0]) for folder in (first, second)]
    assert ids[0] == ids[1]
    assert len(ids[0]) < len(TEXTS[0])


def test_others_refuse_random_weights() -> None:
    assert {"common", "random_weights"}.isdisjoint(names())
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "few_labels", "--random-weights"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert "few_labels needs real weights" in done.stderr
