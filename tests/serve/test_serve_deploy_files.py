"""What stands in deploy/ calls the verb as it is, and systemd takes the units."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

from slmops.cli.app import app

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SERVE = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]


def lists_in(dockerfile: str) -> dict[str, list[str]]:
    """Instruction -> its JSON list."""
    return {
        name: json.loads(raw) for name, raw in re.findall(r"^\s*(ENTRYPOINT|CMD) (\[.*\])$", dockerfile, re.MULTILINE)
    }


def test_the_commands_of_the_files_are_those_of_the_verb() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    lists = lists_in(dockerfile)
    assert lists["ENTRYPOINT"] == ["slmops", "serve"]
    asked = SERVE.make_context("serve", lists["CMD"]).params
    assert (asked["host"], asked["port"], asked["log_format"]) == ("0.0.0.0", 8000, "json")
    unit = (DEPLOY / "slmops.service").read_text()
    command = shlex.split(re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)[0])
    assert Path(command[0]).name == "slmops"
    assert SERVE.make_context("serve", command[2:]).params["drain_s"] == 30


def test_the_container_runs_as_nobody_and_is_asked_whether_it_is_ready() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    last = dockerfile.rsplit("\nFROM ", 1)[1]
    user = re.findall(r"^USER (\d+):(\d+)$", last, re.MULTILINE)
    assert user == [("10001", "10001")]
    assert "/health/ready" in re.findall(r"HEALTHCHECK(?:.*\\\n)*.*", last)[0]
    sources = [word for line in re.findall(r"^COPY (?!--)(.*) \S+$", dockerfile, re.MULTILINE) for word in line.split()]
    assert sources
    assert all((DEPLOY.parent / source).exists() for source in sources)


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    for name in ("slmops.service", "slmops.socket"):
        text = (DEPLOY / name).read_text()
        (tmp_path / name).write_text(text.replace("/opt/slmops/bin/slmops", "/bin/true"))
    units = [str(tmp_path / name) for name in ("slmops.service", "slmops.socket")]
    ran = subprocess.run([analyze, "verify", *units], capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    judged = [analyze, "security", "--offline=true", units[0]]
    told = subprocess.run(judged, capture_output=True, text=True, timeout=60, check=False).stdout
    exposure = float(re.findall(r"exposure level.*: ([\d.]+)", told)[0])
    assert exposure < 2.5
