"""An Ollama with behaviour: its command line as a program on PATH, its server on loopback.

``create`` demands a Modelfile whose ``FROM`` is a GGUF file beside it; ``list`` shows what was created; the server
answers OpenAI's chat completions for models that exist. With ``OLLAMA_FAKE=down`` the program says what the real one
says when no server runs.
"""

from __future__ import annotations

import http.server
import json
import sys
import threading
from pathlib import Path
from typing import Any

PROGRAM = """#!{python}
import json, os, sys
from pathlib import Path
state = Path({state!r})
models = json.loads(state.read_text()) if state.exists() else []
if os.environ.get("OLLAMA_FAKE") == "down":
    sys.exit("Error: could not connect to ollama server, run 'ollama serve' to start it")
match sys.argv[1:]:
    case ["create", name, "-f", file]:
        lines = Path(file).read_text().splitlines()
        source = next((line.split(None, 1)[1] for line in lines if line.startswith("FROM ")), "")
        weights = Path(file).parent / source
        if not weights.is_file() or weights.read_bytes()[:4] != b"GGUF":
            sys.exit(f"Error: invalid model source {{source}}")
        models.append(name if ":" in name else name + ":latest")
        state.write_text(json.dumps(models))
        print("success")
    case ["list"]:
        print("NAME              ID              SIZE      MODIFIED")
        for name in models:
            print(f"{{name}}    0123456789ab    1.0 MB    1 second ago")
    case other:
        sys.exit(f"Error: unknown command {{other}}")
"""


class FakeOllama:
    """Use as a context manager; put ``folder`` first on PATH and ``host`` into OLLAMA_HOST."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state.json"
        program = folder / "ollama"
        program.write_text(PROGRAM.format(python=sys.executable, state=str(self.state)))
        program.chmod(0o755)
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                self._json(200, {"version": "0.99.0-fake"})

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if asked["model"] not in fake.models:
                    self._json(404, {"error": {"message": f"model '{asked['model']}' not found"}})
                    return
                events: list[dict[str, Any]] = [{"choices": [{"delta": {"content": word}}]} for word in ("one ", "two")]
                events.append({"choices": [], "usage": {"completion_tokens": 2}})
                raw = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
                self._send(200, raw.encode(), "text/event-stream")

            def _json(self, status: int, body: dict[str, Any]) -> None:
                self._send(status, json.dumps(body).encode(), "application/json")

            def _send(self, status: int, raw: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def models(self) -> list[str]:
        return json.loads(self.state.read_text()) if self.state.exists() else []

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeOllama:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
