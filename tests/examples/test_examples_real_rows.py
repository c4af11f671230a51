"""Real rows of the two tasks that have no recipe in ``examples/``, from the file to a trained model, in seconds.

The model is tiny and random: what is tested is that real rows of this kind go all the way, and are learnt.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from benchmarks.extraction import write_rows

from fakes.tiny_models import write_tiny_llama
from slmops.artifacts import Message
from slmops.pipeline.tune import train_recipe
from slmops.recipe import parse_recipe
from slmops.runtime import GenerationRequest, open_generator
from slmops.store import Store

PASSAGE_CHARS, SUMMARY_CHARS = 600, 300


def trained(folder: Path, task: str, rows: Path, **data: Any) -> tuple[list[dict[str, float]], str]:
    """The loss curve, and what the model says to the first row."""
    torch.set_num_threads(1)
    write_tiny_llama(folder / "base", context_tokens=2048)
    raw = {
        "name": f"real-{task}",
        "task": task,
        "data": {"train": str(rows), "input": "{text}", "target": "{answer}", "limit": 40, **data},
        "teacher": {"model": str(folder / "base")},
        "train": {"epochs": 3, "precision": "fp32", "learning_rate": 5e-3, "max_tokens": 2048},
    }
    with Store.open(folder / "store") as store:
        checkpoint = train_recipe(parse_recipe(raw), store).checkpoint
        history: list[dict[str, float]] = json.loads((checkpoint.path / "history.json").read_text("utf-8"))
        generator = open_generator(checkpoint.path)
        said = json.loads(rows.read_text("utf-8").splitlines()[0])["text"]
        [answer] = generator.generate([GenerationRequest((Message("user", said),), max_tokens=16)])
        generator.close()
    return history, answer.text


def falls(history: list[dict[str, float]]) -> bool:
    losses = [point["loss"] for point in history if "loss" in point]
    return losses[-1] < 0.9 * losses[0]


def test_extraction_to_json_from_real_sentences(shared_data: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    write_rows(shared_data / "restaurant8k/train_0.json", rows)
    answers = [json.loads(json.loads(line)["answer"]) for line in rows.read_text("utf-8").splitlines()]
    assert all(isinstance(answer, dict) for answer in answers)
    assert sum(map(bool, answers)) > 3000
    history, said = trained(tmp_path, "extraction", rows)
    assert falls(history)
    assert said


def test_summaries_of_real_meetings(shared_data: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    with gzip.open(shared_data / "qmsum/train.jsonl.gz", "rt", encoding="utf-8") as file, rows.open("w") as out:
        for line in file:
            meeting = json.loads(line)
            for asked in meeting["specific_query_list"]:
                first, last = (int(place) for place in asked["relevant_text_span"][0])
                turns = meeting["meeting_transcripts"][first : last + 1]
                said = " ".join(f"{turn['speaker']}: {turn['content']}" for turn in turns)[:PASSAGE_CHARS]
                row = {"text": f"{asked['query']}\n{said}", "answer": asked["answer"][:SUMMARY_CHARS]}
                out.write(json.dumps(row) + "\n")
    history, said = trained(tmp_path, "summarization", rows)
    assert falls(history)
    assert said
