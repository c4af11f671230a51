"""The verbs serve --monitor, monitor and feedback, as a person calls them: one server, its events, and what follows."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from typer.testing import CliRunner

from fakes.teacher_server import Reply, TeacherServer
from fakes.tiny_models import LABELS, write_tiny_classifier
from slmops.artifacts import Bundle, Curated, Variant, drafting
from slmops.cli.app import app
from slmops.errors import DataError, PrivacyError, UsageError
from slmops.monitor.reference import FOLDER, Seen, build_reference, write_reference
from slmops.package import build_bundle
from slmops.pipeline.context import Context
from slmops.pipeline.teach import prepare_data
from slmops.progress import ignore
from slmops.recipe import parse_recipe
from slmops.runtime import open_classifier
from slmops.store import Store

WORDS = ["card", "lost", "refund", "fee", "balance", "account", "top up", "where", "when", "please"]
TEXTS = [f"{WORDS[n % 10]} {WORDS[n // 10 % 10]} number {n}" for n in range(120)]
PERSONAL = "card 4111 1111 1111 1111 of ann@example.com"


def run(*arguments: object, code: int = 0) -> Any:
    """The verb's JSON."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def shown(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


class Served:
    """A folder in which a bundle was served, answered and was judged by its callers."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = root / "store"
        self.bundle = root / "bundle"

    @property
    def where(self) -> tuple[object, ...]:
        return ("--store", self.store)

    def copy(self, to: Path) -> Served:
        shutil.copytree(self.root, to, symlinks=True)
        return Served(to)


def make_bundle(root: Path) -> Bundle:
    with drafting("variant", root / "variant") as draft:
        write_tiny_classifier(draft.path / "model")
    variant = Variant.open(root / "variant")
    model = open_classifier(variant.model_path)
    rows = zip(TEXTS, model.probabilities(TEXTS), strict=True)
    seen = [
        Seen(text, LABELS[int(one.argmax())], LABELS[int(one.argmax())], float(one.max()), True) for text, one in rows
    ]
    recipe = {
        "name": "mine",
        "task": "classification",
        "data": {"train": "rows.csv", "input": "{question}", "target": "{intent}"},
        "teacher": {"prices": {"input_per_million": 2.0, "output_per_million": 8.0, "currency": "EUR"}},
    }
    with drafting("bundle", root / "bundle") as draft:
        build_bundle(
            variant=variant,
            report={"name": "mine"},
            recipe=recipe,
            licenses={"base-model": "x"},
            lineage={},
            draft=draft,
        )
        write_reference(build_reference(TEXTS, seen, about={}), draft.path / FOLDER)
    return Bundle.open(root / "bundle")


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Read only."""
    served = Served(tmp_path_factory.mktemp("served"))
    bundle = make_bundle(served.root)
    policy = served.root / "policy.yaml"
    policy.write_text("content: full\nslices: [tenant]\nnames: cues\n")
    command = [sys.executable, "-m", "slmops", "serve", bundle.path, "--port", "0", "--json", "--monitor", policy]
    server = subprocess.Popen([*map(str, command), *map(str, served.where)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        url = json.loads(server.stdout.readline())["url"]
        with httpx.Client(base_url=url, timeout=60) as client:
            ask(client)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
    return served


def ask(client: httpx.Client) -> None:
    """120 answers; feedback on 30 of them: confirmed, corrected, called bad."""
    for number, text in enumerate(TEXTS):
        asked = f"my name is Ann Lee, {PERSONAL}" if number == 0 else text
        body = {"input": asked, "user": f"user-{number % 4}", "metadata": {"tenant": "ab"[number % 2], "other": "x"}}
        answer = client.post("/v1/classify", json=body)
        assert answer.status_code == 200
        if number < 30:
            said: dict[str, Any] = {"score": 1.0} if number % 3 else {"score": 0.0, "user": f"user-{number % 4}"}
            if number % 6 == 0:
                said |= {"correction": "new intent", "comment": PERSONAL}
            given = client.post("/v1/feedback", json={"id": answer.headers["x-request-id"], **said})
            assert given.status_code == 200, given.text


@pytest.fixture
def served(before: Served, tmp_path: Path) -> Served:
    """To be changed."""
    return before.copy(tmp_path / "served")


def test_status_tells_what_is_there(before: Served) -> None:
    found = run("monitor", "status", *before.where)
    assert (found["events"], found["feedback"]) == (120, 30)
    (version,) = found["versions"]
    assert version["version"] == Bundle.open(before.bundle).digest
    assert found["gaps"] == []
    assert "120 events" in shown("monitor", "status", *before.where)


def test_no_file_of_the_store_holds_anything_personal(before: Served) -> None:
    files = [path for path in (before.store / "monitor").rglob("*") if path.is_file()]
    assert any(path.name == "events.db" for path in files)
    for path in files:
        raw = path.read_bytes()
        for part in (b"4111 1111", b"ann@example", b"Ann Lee", b"user-1"):
            assert part not in raw, path


def test_the_report_and_its_page(before: Served, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    found = run("monitor", "report", before.bundle, "--html", page, *before.where)
    assert found["figures"]["requests"] == 120
    assert found["figures"]["feedback_score"]["rows"] == 30
    assert set(found["groups"]) == {"slice tenant=a", "slice tenant=b"}
    assert found["drift"]["rows"] == 120
    assert {"novelty", "labels", "confidence"} <= {view["name"] for view in found["drift"]["views"]}
    text = page.read_text("utf-8")
    assert "tiny-intents" in text
    assert "by the teacher" in text
    for outside in ("http://", "https://", "<script", "4111 1111", "number 7"):
        assert outside not in text
    one = run("monitor", "report", before.bundle, "--slice", "tenant=a", *before.where)
    assert one["figures"]["requests"] == 60
    assert run("monitor", "report", "--days", "0", *before.where)["figures"]["requests"] == 0
    assert "look like" in shown("monitor", "report", before.bundle, *before.where)


def test_drift_is_an_exit_code(served: Served) -> None:
    assert not run("monitor", "drift", served.bundle, *served.where)["alarm"]
    other = [(f"nebula quasar telescope {n}", row) for n, row in enumerate(TEXTS)]
    shutil.rmtree(served.bundle / FOLDER)
    seen = [Seen(text, "fee", "fee", 0.99, True) for text, _ in other]
    write_reference(build_reference([text for text, _ in other], seen, about={}), served.bundle / FOLDER)
    found = run("monitor", "drift", served.bundle, *served.where, code=1)
    assert {"labels", "confidence"} <= {view["name"] for view in found["views"] if view["alarm"]}
    assert "▲ labels" in shown("monitor", "drift", served.bundle, *served.where, code=1)
    assert "nothing to compare" in shown("monitor", "drift", *served.where)


class Hook(BaseHTTPRequestHandler):
    told: ClassVar[list[Any]] = []

    def do_POST(self) -> None:
        self.told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[str]:
    Hook.told = []
    server = HTTPServer(("127.0.0.1", 0), Hook)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/alerts"
    server.shutdown()
    thread.join()
    server.server_close()


def test_alerts_tell_a_webhook_of_changes_alone(served: Served, hook: str, tmp_path: Path) -> None:
    rules = tmp_path / "alerts.yaml"
    rules.write_text(
        f"webhook: {hook}\nrules:\n- {{metric: corrected_share, above: 0.01}}\n- {{metric: drift, above: 0}}\n"
    )
    for _ in range(2):
        (firing,) = run("monitor", "alerts", rules, served.bundle, *served.where, code=1)["firing"]
        assert firing["rule"] == "corrected_share above 0.01"
    (told,) = Hook.told
    assert told["firing"] == [firing]
    assert told["model"] == "tiny-intents"
    assert "number" not in json.dumps(told)
    rules.write_text(f"webhook: {hook}\nrules: [{{metric: drift, above: 0}}]\n")
    assert run("monitor", "alerts", rules, served.bundle, *served.where) == {"firing": []}
    assert Hook.told[1]["ended"] == ["corrected_share above 0.01"]


def test_the_ledger_takes_prices_from_the_recipe(before: Served) -> None:
    found = run("monitor", "ledger", before.bundle, "--training-hour", 1, "--training-hours", 3, *before.where)
    tokens = found["prompt_tokens"], found["completion_tokens"]
    assert found["requests"] == tokens[1] == 120
    assert found["teacher_cost"] == pytest.approx((2 * tokens[0] + 8 * tokens[1]) / 1e6)
    assert (found["training_cost"], found["currency"]) == (3.0, "EUR")
    assert found["break_even"]["days"] > 0
    assert "Paid for after" in shown("monitor", "ledger", before.bundle, "--training-hour", 1, *before.where)


def test_export_is_by_hand(before: Served, tmp_path: Path) -> None:
    found = run("monitor", "export", tmp_path / "out", *before.where)
    assert (found["events"], found["feedback"], found["judgements"]) == (120, 30, 0)


def test_feedback_becomes_rows_that_a_recipe_reads_with_lineage(served: Served, tmp_path: Path) -> None:
    found = run("feedback", served.bundle, "--out", tmp_path / "rows.jsonl", *served.where)
    summary = found["summary"]
    assert summary["sources"] == {"confirmed": 20, "correction": 5}
    assert summary["new_labels"] == ["new intent"]
    assert summary["quarantined"]["reasons"] == {"called bad without a correction, and no teacher was given": 5}
    rows = [json.loads(line) for line in Path(found["rows"]).read_text("utf-8").splitlines()]
    assert [*rows[0]][:2] == ["question", "intent"]
    assert rows[0]["question"] == "my name is <NAME>, card <CARD> of <EMAIL>"
    assert (tmp_path / "rows.jsonl").read_text("utf-8") == Path(found["rows"]).read_text("utf-8")
    assert run("feedback", served.bundle, *served.where)["digest"] == found["digest"]
    recipe = parse_recipe(
        {
            "name": "again",
            "task": "classification",
            "data": {"train": found["rows"], "input": "{question}", "target": "{intent}", "near_duplicates": None},
        }
    )
    with Store.open(served.store) as store:
        data = prepare_data(Context(recipe, store, offline=True, progress=ignore))
        above = store.trace(data).ancestors
    assert [node.kind for node in above].count("curated") == 1
    assert Bundle.open(served.bundle).digest in {node.digest for node in above}


def test_a_teacher_on_this_machine_answers_what_was_only_called_bad(served: Served) -> None:
    with drafting("variant", served.root / "teacher") as draft:
        write_tiny_classifier(draft.path / "model")
    found = run("feedback", served.bundle, "--teacher", served.root / "teacher", *served.where)
    reasons = found["summary"]["quarantined"]["reasons"]
    assert sum(rows for reason, rows in reasons.items() if "teacher" in reason) == 5


def test_forgetting_a_person_takes_the_rows_made_of_them_too(served: Served) -> None:
    made = run("feedback", served.bundle, *served.where)
    found = run("monitor", "forget", "user-0", *served.where)
    assert (found["events"], found["judgements"]) == (30, 0)
    assert found["feedback"] >= 8
    assert len(found["derived"]) == 1
    assert not Path(made["rows"]).exists()
    assert run("monitor", "status", *served.where)["events"] == 90
    again = run("feedback", served.bundle, *served.where)
    assert again["digest"] != made["digest"]
    assert run("monitor", "forget", "user-0", *served.where)["events"] == 0
    with Store.open(served.store) as store:
        assert isinstance(store.find(again["digest"]), Curated)
    shown("monitor", "forget", "user-1", *served.where, code=1)  # asks, and nobody says yes
    assert run("monitor", "status", *served.where)["events"] == 90


def test_pruning_by_hand(served: Served) -> None:
    assert run("monitor", "prune", "--days", 1, *served.where)["events"] == 0
    assert run("monitor", "prune", "--days", 0, *served.where)["events"] == 120


def test_a_teacher_judges_a_share_and_reads_redacted_text_alone(served: Served, tmp_path: Path) -> None:
    with TeacherServer(lambda prompt, before: Reply('{"reason": "fine", "score": 4}')) as server:
        recipe = tmp_path / "judge.yaml"
        recipe.write_text(
            "name: judged\ntask: classification\ndata: {train: rows.csv}\n"
            f"teacher: {{model: 'openai:judge', base_url: {server.url}}}\n"
        )
        arguments = ("monitor", "judge", recipe, "--share", "0.1", *served.where)
        found = run(*arguments)
        assert (found["asked"], found["scored"], found["mean"]) == (12, 12, 4.0)
        assert run(*arguments)["asked"] == 0
        assert len(server.bodies) == 12
        for part in ("4111 1111", "@example", "Ann Lee"):
            assert part not in json.dumps(server.bodies)
        assert run("monitor", "report", *served.where)["figures"]["judge_score"] == {"value": 4.0, "rows": 12}
        text = recipe.read_text().replace(server.url, "https://example.com/v1")
        recipe.write_text(text)
        with pytest.raises(PrivacyError):
            run(*arguments)


def test_wrong_use_is_told(before: Served, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Nothing was recorded here"):
        run("monitor", "status", "--store", tmp_path)
    with pytest.raises(UsageError, match="no KEY=VALUE"):
        run("monitor", "report", "--slice", "acme", *before.where)
    with pytest.raises(DataError, match="no feedback"):
        run("feedback", before.bundle, "--days", "0", *before.where)
    for policy, told in (("everything", "off, sampled, full"), (str(tmp_path), "cannot be read")):
        result = subprocess.run(
            [sys.executable, "-m", "slmops", "serve", before.bundle, "--port", "0", "--monitor", policy],
            capture_output=True,
            text=True,
        )
        assert result.returncode == 2
        assert told in result.stderr
