"""A model's way round, each step by its verb: recipe → run → serve → feedback → improve → rollout → why.

Run as ``python flow_on_loopback.py FOLDER``: FOLDER holds ``recipe.yaml`` and ``policy.yaml``; one JSON object on the
last line tells what happened. With ``SLMOPS_OWN_NETWORK`` set it is in a network namespace of its own, raises loopback
first, and tells how often anything in it tried to send where no route leads.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

SLMOPS = [sys.executable, "-m", "slmops"]
TEXTS = {
    "balance": "what is the balance of my account please",
    "lost": "my card is lost and I want a new card",
    "refund": "I want a refund for the fee now",
}
FILLER = ["hello", "how", "are", "you", "today", "tell", "me", "where", "it", "is"]
MOST_S = 120.0


def main(folder: Path) -> dict[str, Any]:
    if os.environ.get("SLMOPS_OWN_NETWORK"):
        raise_loopback()
    os.chdir(folder)
    verb("run", "recipe.yaml", "--offline", "--json")
    deployed = folder / ".slmops/runs/tiny/bundle"
    with served(deployed, "--monitor", "full") as url:
        gave = give_feedback(url)
    learnt = verb("feedback", deployed, "--json")
    improved = verb("improve", "recipe.yaml", "--feedback", learnt["rows"], "--offline", "--json")
    with served(deployed, "--candidate", improved["bundle"], "--policy", "policy.yaml") as url:
        outcome, statuses, labels = ask_until_over(url)
    why = verb("improve", "why", "recipe.yaml", "--json")
    trace = verb("trace", improved["bundle"], "--json")
    return {
        "feedback": gave,
        "learnt": learnt["summary"],
        "improved": {key: improved[key] for key in ("passed", "verdict", "corrections", "scores")},
        "outcome": outcome,
        "statuses": dict(statuses),
        "labels": labels,
        "events": [entry["event"] for entry in why["rollouts"][-1]["journal"]],
        "sources": [node["name"] for node in trace["nodes"] if node["kind"] == "source"],
        "sent_nowhere": sent_nowhere() if os.environ.get("SLMOPS_OWN_NETWORK") else None,
    }


def verb(*arguments: object) -> dict[str, Any]:
    ran = subprocess.run([*SLMOPS, *map(str, arguments)], capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{arguments} ended with {ran.returncode}: {ran.stderr[-3000:]}{ran.stdout[-1000:]}")
    answer: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return answer


@contextmanager
def served(*arguments: object) -> Iterator[str]:
    command = [*SLMOPS, "serve", *map(str, arguments), "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.terminate()
        process.wait(60)


def give_feedback(url: str) -> dict[str, int]:
    """Callers ask; they say that an answer was right, or what would have been right."""
    rng, told = random.Random(3), Counter[str]()
    with httpx.Client(base_url=url, timeout=60) as client:
        for number in range(60):
            right = "refund" if number % 2 else ("balance", "lost")[number // 2 % 2]
            words = [*TEXTS[right].split(), *rng.sample(FILLER, 3)]
            rng.shuffle(words)
            reply = client.post("/v1/classify", json={"input": " ".join(words)})
            told["asked"] += 1
            said: dict[str, Any] = {"score": 1} if reply.json()[0]["label"] == right else {"correction": right}
            told.update(said.keys())
            client.post("/v1/feedback", json={"id": reply.headers["x-request-id"], **said}).raise_for_status()
    return dict(told)


def ask_until_over(url: str) -> tuple[str, Counter[str], dict[str, str]]:
    """Outcome, answers by status, and what is answered after it."""
    statuses: Counter[str] = Counter()
    with httpx.Client(base_url=url, timeout=60) as client:
        ends, status = time.monotonic() + MOST_S, {"outcome": "running"}
        while status["outcome"] == "running" and time.monotonic() < ends:
            for text in (*TEXTS.values(), *TEXTS.values()):
                statuses[str(client.post("/v1/classify", json={"input": text}).status_code)] += 1
            status = client.get("/v1/rollout").json()
        labels = {text: client.post("/v1/classify", json={"input": text}).json()[0]["label"] for text in TEXTS.values()}
    return status["outcome"], statuses, labels


# --- the network ------------------------------------------------------------------------------------------------


def raise_loopback() -> None:
    with socket.socket() as any_socket:
        up_running_loopback = struct.pack("16sh", b"lo", 0x1 | 0x8 | 0x40)
        fcntl.ioctl(any_socket, 0x8914, up_running_loopback)  # SIOCSIFFLAGS


def sent_nowhere() -> int:
    """What the kernel counted in this namespace: packets and connections for which there was no route, by anybody."""
    found = 0
    lines = Path("/proc/net/snmp").read_text().splitlines()
    names, values = (line.split()[1:] for line in lines if line.startswith("Ip:"))
    found += int(dict(zip(names, values, strict=True))["OutNoRoutes"])
    six = Path("/proc/net/snmp6")
    for line in six.read_text().splitlines() if six.exists() else ():
        if line.startswith("Ip6OutNoRoutes"):
            found += int(line.split()[1])
    return found


if __name__ == "__main__":
    if sys.argv[1] == "--reach-out":  # what the test of the watching itself does
        raise_loopback()
        before = sent_nowhere()
        for reach in (
            lambda: socket.create_connection(("192.0.2.1", 80), 1),
            lambda: socket.getaddrinfo("example", 80),
        ):
            try:
                reach()
            except OSError:
                continue
        sys.stdout.write(json.dumps({"sent_nowhere": sent_nowhere() - before}) + "\n")
    else:
        sys.stdout.write(json.dumps(main(Path(sys.argv[1]).resolve())) + "\n")
