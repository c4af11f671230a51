"""Fine-tuning alone: every task, own losses, forgetting, trackers, several processes, exact resume, bad input."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from train_helpers import make_dataset, make_draft, toy_rows

from skipping import skip_or_fail
from slmops.artifacts import Dataset, Draft, Message, Row
from slmops.chat import ChatTokenizer
from slmops.errors import DataError, GateError, MissingExtraError, ModelError, RecipeError
from slmops.progress import Progress
from slmops.recipe import TrainConfig
from slmops.train import FinetuneJob, finetune
from slmops.train.custom_loss import adapt_signature, load_loss
from slmops.train.forgetting import Forgetting, check_forgetting
from slmops.train.generator.answers import EncodedRow, check_masks
from slmops.train.loop import last_checkpoint

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["slmops.train", "transformers.models.llama.modeling_llama", "peft"])
QA = {"where is my card": "it is lost", "what is the fee": "no fee", "hello": "hello how are you"}


def to_messages(row: Row) -> tuple[Message, ...]:
    return row.messages


def rows_of(pairs: Mapping[str, str | None], copies: int) -> list[Row]:
    return [Row(f"{c}-{n}", (Message("user", q),), a) for c in range(copies) for n, (q, a) in enumerate(pairs.items())]


def chats(folder: Path, pairs: Mapping[str, str | None] = QA, copies: int = 4) -> Dataset:
    return make_dataset(folder, {"train": rows_of(pairs, copies), "validation": rows_of(pairs, 1)})


def job_of(llama: Path, dataset: Dataset, draft: Draft, *, closed: bool = False, **settings: Any) -> FinetuneJob:
    own = {name: settings.pop(name) for name in ("loss_in_python", "tracking") if name in settings}
    config = TrainConfig(**{"precision": "fp32", "batch_size": 4, "epochs": 4, "learning_rate": 5e-3, **settings})
    return FinetuneJob(
        llama,
        "pypi:tiny",
        "d" * 64,
        dataset,
        None if closed else to_messages,
        config,
        0,
        draft,
        name="tuned",
        loss=own.get("loss_in_python"),
        tracking=own.get("tracking"),
    )


def history_of(draft: Draft) -> list[dict[str, float]]:
    history: list[dict[str, float]] = json.loads((draft.path / "history.json").read_text())
    return history


# --- closed label sets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "bottleneck"])
def test_a_classifier_learns_by_every_method(llama: Path, tmp_path: Path, method: str) -> None:
    from slmops.models.classifier import load_classifier

    if method == "qlora":
        pytest.importorskip("bitsandbytes") if not os.environ.get("CI") else None
    rows = {"train": toy_rows(48, 0), "validation": toy_rows(24, 1, prefix="v")}
    dataset, draft = make_dataset(tmp_path / "data", rows, ["balance", "lost", "refund"]), make_draft(tmp_path)
    rate = 1e-3 if method == "full" else 1e-2
    finetune(job_of(llama, dataset, draft, closed=True, method=method, batch_size=8, epochs=6, learning_rate=rate))
    assert draft.metrics["validation_accuracy"] > 0.8
    classifier = load_classifier(draft.path)
    tokenizer = ChatTokenizer.load(draft.path)
    losses = []
    with torch.no_grad():
        for row in rows["validation"]:
            logits = classifier(torch.tensor([tokenizer.encode(row.text)]))
            losses.append(F.cross_entropy(logits, torch.tensor([classifier.labels.index(row.target)])).item())
    assert sum(losses) / len(losses) == pytest.approx(draft.metrics["validation_loss"], rel=2e-3)
    assert (draft.path / "adapter").exists() == (method in {"lora", "qlora"})
    assert (draft.path / "bottleneck").exists() == (method == "bottleneck")


# --- what is learnt is one thing, however it is divided ------------------------------------------------------------


def weights_of(draft: Draft) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(draft.path / "model.safetensors")
    return weights


@pytest.mark.parametrize("settings", [{"accumulation": 3}, {"packing": False}, {"checkpoint_activations": True}])
def test_division_packing_and_recomputation_change_nothing_but_rounding(
    llama: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Rows of unlike answers: a mean of means would be another loss."""
    dataset = chats(tmp_path / "data", {**QA, "tell me": "what is the balance of my account please tell me now"})
    drafts = [make_draft(tmp_path / name) for name in "ab"]
    for draft, more in zip(drafts, ({}, settings), strict=True):
        finetune(job_of(llama, dataset, draft, method="full", epochs=2, batch_size=8, learning_rate=1e-3, **more))
    for a, b in zip(history_of(drafts[0]), history_of(drafts[1]), strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    for name, tensor in weights_of(drafts[0]).items():
        torch.testing.assert_close(tensor, weights_of(drafts[1])[name], atol=2e-4, rtol=2e-3)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(llama: Path, tmp_path: Path) -> None:
    dataset = chats(tmp_path / "data", {**QA, "tell me": "what is the balance of my account please tell me now"})
    alone, together = make_draft(tmp_path / "one"), make_draft(tmp_path / "two")
    events: list[Progress] = []
    settings = {"method": "lora", "epochs": 2, "batch_size": 8, "learning_rate": 1e-3}
    finetune(job_of(llama, dataset, alone, **settings))
    finetune(job_of(llama, dataset, together, processes=2, **settings), progress=events.append)
    assert [event.done for event in events if not event.figures] == [1, 2, 3, 4]
    assert together.metrics.keys() == alone.metrics.keys()
    for a, b in zip(history_of(alone), history_of(together), strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    for name, tensor in weights_of(alone).items():
        torch.testing.assert_close(tensor, weights_of(together)[name], atol=2e-4, rtol=2e-3)


@pytest.mark.slow
def test_an_error_in_one_of_two_processes_is_told(llama: Path, tmp_path: Path) -> None:
    dataset = chats(tmp_path / "data")
    with pytest.raises(ModelError, match=r"train.lora.rank is 99"):
        finetune(job_of(llama, dataset, make_draft(tmp_path), processes=2, method="lora", lora={"rank": 99}))


def test_bf16_learns_like_fp32_and_writes_fp32(llama: Path, tmp_path: Path) -> None:
    """Frozen matrices are kept in bf16 while training; what is written is the base as it was plus the adapter."""
    dataset, drafts = chats(tmp_path / "data"), [make_draft(tmp_path / name) for name in "ab"]
    forgetting = {"data": str(general_rows(tmp_path)), "budget": 99.0}
    for draft, precision in zip(drafts, ("fp32", "bf16"), strict=True):
        finetune(job_of(llama, dataset, draft, precision=precision, forgetting=forgetting, epochs=6))
    losses = [history_of(draft)[-1]["validation_loss"] for draft in drafts]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert drafts[1].metrics["forgetting"]["loss_after"] == pytest.approx(
        drafts[0].metrics["forgetting"]["loss_after"], rel=0.1
    )
    before, after = load_file(llama / "model.safetensors"), weights_of(drafts[1])
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}


# --- killed and gone on -------------------------------------------------------------------------------------------


def run_apart(llama: Path, data: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    import slmops.train.loop as loop

    on_step_end = loop._Watch.on_step_end

    def saving(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        on_step_end(self, args, state, control, **rest)
        control.should_save = state.global_step % 3 == 0
        time.sleep(0.05)

    loop._Watch.on_step_end = saving  # type: ignore[method-assign]
    draft = make_draft(folder)
    lora = {"rank": 4, "dropout": 0.1}
    finetune(job_of(llama, Dataset.open(data), draft, method="lora", lora=lora, epochs=10, accumulation=2))


@pytest.mark.slow
def test_after_kill_9_the_curve_is_the_same_to_the_last_digit(llama: Path, tmp_path: Path) -> None:
    """With dropout, so that random numbers go on too; and with steps that are worked through in parts."""
    dataset = chats(tmp_path / "data")
    whole = PROCESSES.Process(target=run_apart, args=(llama, dataset.path, tmp_path / "whole"))
    whole.start()
    whole.join(300)
    assert whole.exitcode == 0
    killed = 0
    for _ in range(6):
        process = PROCESSES.Process(target=run_apart, args=(llama, dataset.path, tmp_path / "cut"))
        process.start()
        checkpoints = tmp_path / "cut/work/checkpoints"
        before = last_checkpoint(checkpoints) if checkpoints.exists() else None
        started = time.monotonic()
        while process.is_alive() and time.monotonic() - started < 120:
            now = sorted(checkpoints.glob("checkpoint-*/trainer_state.json")) if checkpoints.exists() else []
            if killed < 2 and now and (before is None or now[-1].parent != before) and len(now) >= 1:
                time.sleep(0.1)
                if process.is_alive() and process.pid:
                    os.kill(process.pid, signal.SIGKILL)
                    killed += 1
                break
            time.sleep(0.02)
        process.join(300)
        if process.exitcode == 0:
            break
    assert killed == 2
    ends = [tmp_path / name / "out" for name in ("whole", "cut")]
    for name in ("history.json", "model.safetensors", "adapter/adapter_model.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes(), name


# --- own losses -----------------------------------------------------------------------------------------------------


def smoothed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, targets, label_smoothing=0.2)


@pytest.mark.parametrize("closed", [False, True])
def test_a_loss_from_a_file_and_the_same_one_in_python(llama: Path, tmp_path: Path, closed: bool) -> None:
    file = tmp_path / "my_loss.py"
    file.write_text(
        "import torch.nn.functional as F\n"
        "def smooth(logits, targets, batch):\n"
        "    assert 'input_ids' in batch\n"
        "    return F.cross_entropy(logits, targets, label_smoothing=0.2)\n"
    )
    rows = {"train": toy_rows(12, 0), "validation": toy_rows(6, 1)}
    dataset = make_dataset(tmp_path / "data", rows, ["balance", "lost", "refund"]) if closed else chats(tmp_path / "d")
    drafts = [make_draft(tmp_path / name) for name in "abc"]
    ways: list[dict[str, Any]] = [{"loss": f"{file}:smooth"}, {"loss_in_python": smoothed}, {}]
    for draft, way in zip(drafts, ways, strict=True):
        finetune(job_of(llama, dataset, draft, closed=closed, epochs=2, **way))
    assert weights_of(drafts[0]).keys() == weights_of(drafts[2]).keys()
    first, second, plain = (weights_of(draft) for draft in drafts)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], plain[name]) for name in first)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("logits.sum() * float('nan')", "returned nan for the first batch"),
        ("logits.log_softmax(-1)[:, 0]", r"returned a tensor of shape \[\d+\]"),
        ("logits", r"returned a tensor of shape \[\d+, 300\]"),
        ("logits.sum().item()", "returned a float"),
        ("logits.detach().sum()", "does not depend on the logits"),
    ],
)
def test_a_loss_that_is_none_is_told_before_training(llama: Path, tmp_path: Path, returned: str, said: str) -> None:
    file = tmp_path / "bad.py"
    file.write_text(f"def loss(logits, targets):\n    return {returned}\n")
    draft = make_draft(tmp_path)
    with pytest.raises(ModelError, match=said):
        finetune(job_of(llama, chats(tmp_path / "data"), draft, loss=f"{file}:loss"))
    assert not list(draft.work.glob("checkpoints/*"))


def test_losses_that_cannot_be_loaded(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def one(a):\n    return a\ndef two(a, b):\n    return a\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    for reference, said in {
        "noname": "Write it as",
        f"{tmp_path}/absent.py:f": "is not there",
        f"{file}:three": "has no function three. Functions there: one, two",
        f"{file}:one": "takes 1 arguments",
        f"{tmp_path}/broken.py:f": "ZeroDivisionError: division by zero",
    }.items():
        with pytest.raises(RecipeError) as caught:
            load_loss(reference)
        assert said in str(caught.value)
    assert load_loss(f"{file}:two")(torch.ones(()), torch.ones(()), {}) == 1
    assert adapt_signature(max) is max


def test_a_loss_that_becomes_nan_leaves_its_batch(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "late.py"
    file.write_text(
        "import torch.nn.functional as F\ncalls = []\n"
        "def loss(logits, targets):\n"
        "    calls.append(1)\n"
        "    value = F.cross_entropy(logits, targets)\n"
        "    return value * float('nan') if len(calls) == 4 else value\n"
    )
    draft = make_draft(tmp_path)
    with pytest.raises(ModelError, match=r"The loss became nan at step 3. The batch is in") as caught:
        finetune(job_of(llama, chats(tmp_path / "data"), draft, loss=f"{file}:loss", packing=False))
    folder = draft.work / "offending-batch"
    assert str(folder) in str(caught.value)
    about = json.loads((folder / "batch.json").read_text())
    assert (about["step"], about["loss"], len(about["rows"])) == (3, "nan", 4)
    batch = load_file(folder / "batch.safetensors")
    assert batch["input_ids"].shape[0] == 4
    assert batch.keys() == {"input_ids", "attention_mask", "supervised"}


# --- forgetting -----------------------------------------------------------------------------------------------------


def general_rows(folder: Path) -> Path:
    path = folder / "general.jsonl"
    chat = {"messages": [{"role": "user", "content": "what is the fee"}], "target": "my account"}
    path.write_text(json.dumps({"text": "hello world how are you today"}) + "\n\n" + json.dumps(chat) + "\n")
    return path


def test_forgetting_within_its_budget_is_told(llama: Path, tmp_path: Path) -> None:
    draft = make_draft(tmp_path)
    forgetting = {"data": str(general_rows(tmp_path)), "budget": 50.0}
    finetune(job_of(llama, chats(tmp_path / "data"), draft, forgetting=forgetting, epochs=2))
    found = draft.metrics["forgetting"]
    assert found["rise"] == pytest.approx(found["loss_after"] / found["loss_before"] - 1)
    tokenizer = ChatTokenizer.load(llama)
    for folder, name in ((llama, "loss_before"), (draft.path, "loss_after")):
        assert found[name] == pytest.approx(general_loss(folder, tokenizer), rel=1e-3)


def general_loss(folder: Path, tokenizer: ChatTokenizer) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = tokenizer.encode("hello world how are you today")
    chat = tokenizer.encode_training((Message("user", "what is the fee"),), "my account")
    losses: list[float] = []
    with torch.no_grad():
        for ids, mask in ((text, [False] + [True] * (len(text) - 1)), (chat.input_ids, chat.loss_mask)):
            scores = model(torch.tensor([list(ids)])).logits[0].log_softmax(-1)
            losses += [-scores[i - 1, ids[i]].item() for i in range(1, len(ids)) if mask[i]]
    return sum(losses) / len(losses)


def test_forgetting_beyond_the_budget_fails(llama: Path, tmp_path: Path) -> None:
    draft = make_draft(tmp_path)
    forgetting = {"data": str(general_rows(tmp_path)), "budget": 0.0}
    settings = {"method": "full", "learning_rate": 3e-2, "epochs": 6}
    with pytest.raises(GateError, match="The model forgot: its loss on the general rows rose by"):
        finetune(job_of(llama, chats(tmp_path / "data"), draft, forgetting=forgetting, **settings))
    assert not (draft.path / "model.safetensors").exists()


def test_the_budget_is_a_share() -> None:
    check_forgetting(Forgetting(2.0, 2.04, 0, 0), 0.0200001)
    check_forgetting(Forgetting(2.0, 1.0, 0, 0), 0.0)
    with pytest.raises(GateError, match=r"rose by 3.0%, from 2.000 to 2.060; train.forgetting.budget allows 2.0%"):
        check_forgetting(Forgetting(2.0, 2.06, 0, 0), 0.02)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "There is no general row"),
        ('{"question": "a"}\n', "This is no general row: KeyError"),
        ("{\n", "This is no general row: JSONDecodeError"),
        (None, "cannot be read"),
    ],
)
def test_general_rows_that_are_none(llama: Path, tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "general.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=said):
        finetune(job_of(llama, chats(tmp_path / "data"), make_draft(tmp_path), forgetting={"data": str(path)}))


def test_a_classifier_has_no_general_text(llama: Path, tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", {"train": toy_rows(6, 0), "validation": toy_rows(3, 1)}, ["balance"])
    with pytest.raises(RecipeError, match="a classifier keeps no output layer"):
        finetune(job_of(llama, dataset, make_draft(tmp_path), closed=True, forgetting={"data": "x.jsonl"}))


# --- trackers -------------------------------------------------------------------------------------------------------


def installed(name: str) -> None:
    try:
        __import__(name)
    except ImportError:
        skip_or_fail(f"{name} is not installed (the extra {name})")


def test_tensorboard_reads_the_curve_back(llama: Path, tmp_path: Path) -> None:
    installed("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    draft = make_draft(tmp_path)
    finetune(job_of(llama, chats(tmp_path / "data"), draft, trackers=["tensorboard"], tracking=tmp_path / "tracking"))
    events = EventAccumulator(str(tmp_path / "tracking/tensorboard/tuned"))
    events.Reload()
    history = history_of(draft)
    losses = [event.step for event in events.Scalars("loss")]
    for name, most in (("machine/memory_mb", 1e6), ("machine/cpu_cores", 1e3)):
        assert [event.step for event in events.Scalars(name)] == losses
        assert all(0 <= event.value < most for event in events.Scalars(name))
    assert events.Scalars("machine/memory_mb")[0].value > 50
    for name in ("loss", "validation_loss", "learning_rate", "grad_norm"):
        expected = [(int(point["step"]), point[name]) for point in history if name in point]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6)
        assert found


def test_mlflow_reads_the_curve_back(llama: Path, tmp_path: Path) -> None:
    installed("mlflow")
    from mlflow import MlflowClient

    draft = make_draft(tmp_path)
    finetune(job_of(llama, chats(tmp_path / "data"), draft, trackers=["mlflow"], tracking=tmp_path / "tracking"))
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/tracking/mlflow.db")
    experiment = client.get_experiment_by_name("tuned")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["method"] == "lora"
    found = client.get_metric_history(run.info.run_id, "validation_loss")
    expected = [(p["step"], p["validation_loss"]) for p in history_of(draft) if "validation_loss" in p]
    assert [(m.step, m.value) for m in found] == expected
    assert client.get_metric_history(run.info.run_id, "machine/memory_mb")[0].value > 50
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_a_tracker_that_is_not_installed(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import slmops.train.trackers as trackers

    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"train.trackers: mlflow") as caught:
        finetune(job_of(llama, chats(tmp_path / "data"), make_draft(tmp_path), trackers=["mlflow"]))
    assert "slmops[mlflow]" in str(caught.value)


def test_no_tracker_no_import(llama: Path, tmp_path: Path) -> None:
    import subprocess

    code = "import slmops.train, sys; print([m for m in ('mlflow', 'tensorboard') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- rows that cannot be trained on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", [False, True])
def test_a_validation_split_of_zero_rows(llama: Path, tmp_path: Path, closed: bool) -> None:
    dataset = make_dataset(tmp_path / "data", {"train": toy_rows(6, 0)}, ["balance", "lost", "refund"])
    with pytest.raises(DataError, match="The validation split has no") as caught:
        finetune(job_of(llama, dataset, make_draft(tmp_path), closed=closed))
    assert "data.split.validation" in (caught.value.remedy or "")


def test_masks_of_zeros_and_ones() -> None:
    good, none, all_ = EncodedRow([1, 2, 3], [False, True, True]), EncodedRow([1, 2], [False] * 2), [True] * 3
    check_masks([good], "train")
    check_masks([good, EncodedRow([1, 2, 3], all_)], "train")
    with pytest.raises(DataError, match="row 2: The loss mask of this row of the train split is all zeros"):
        check_masks([good, none], "train", Path("rows"))
    with pytest.raises(DataError, match="The loss masks of all 2 rows of the train split are all ones"):
        check_masks([EncodedRow([1, 2, 3], all_)] * 2, "train")


# --- memory -----------------------------------------------------------------------------------------------------------


def test_parts_follow_the_free_memory(llama: Path, tmp_path: Path) -> None:
    from slmops.errors import MemoryBudgetError
    from slmops.train.batch_size import part_tokens

    def tokens(free: int, name: str, method: Any = "full", longest: int = 16) -> int | None:
        return part_tokens(llama, method, longest=longest, logit_share=0.5, work=tmp_path / name, available_bytes=free)

    few, many = tokens(8_000_000, "a"), tokens(80_000_000, "b")
    assert few is not None
    assert many is not None
    assert 16 <= few < many
    assert 8 < many / few < 12 or many / few > 8
    assert (tokens(8_000_000, "c", "lora") or 0) > few
    assert tokens(1, "a") == few, "remembered for a run that goes on"
    with pytest.raises(MemoryBudgetError, match="tokens at once takes weights"):
        tokens(1_000_000, "d", longest=500)


def test_overfitting_is_told(llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = {"train": rows_of({"hello": "hello how are you"}, 8), "validation": rows_of({"tell me": "no fee"}, 1)}
    dataset, draft = make_dataset(tmp_path / "data", data), make_draft(tmp_path)
    settings = {"method": "full", "epochs": 20, "learning_rate": 1e-2, "checkpoint_every_steps": 2}
    finetune(job_of(llama, dataset, draft, **settings))
    [warning] = draft.metrics["warnings"]
    assert warning.startswith("The model overfits: since step")
    assert warning in caplog.text


def test_early_stopping_keeps_the_best(llama: Path, tmp_path: Path) -> None:
    data = {"train": rows_of({"hello": "hello how are you"}, 8), "validation": rows_of({"tell me": "no fee"}, 1)}
    dataset, draft = make_dataset(tmp_path / "data", data), make_draft(tmp_path)
    settings = {"method": "full", "epochs": 20, "learning_rate": 1e-2, "checkpoint_every_steps": 2, "patience": 2}
    finetune(job_of(llama, dataset, draft, **settings))
    losses = [point["validation_loss"] for point in history_of(draft) if "validation_loss" in point]
    assert len(losses) < 20
    assert losses.index(min(losses)) == len(losses) - 3
    assert math.isfinite(min(losses))
