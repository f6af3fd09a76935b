"""The HTTP service: what it answers, to friends and strangers."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import pytest
from command_line import run_cli

from merge_engine.serve.resolver import Resolver

pytest.importorskip("starlette")
pytest.importorskip("httpx")

from merge_engine.serve.service import LARGEST_BODY, make_app


def client_of(served, tmp_path, **options):
    from starlette.testclient import TestClient

    resolver = Resolver(served, tmp_path / "cache", limit="1GB")
    return TestClient(make_app(resolver, **options)), resolver


@pytest.mark.quick
def test_a_merge_by_loraxs_names_and_by_its_name(served, tmp_path):
    client, resolver = client_of(served, tmp_path)
    asked = {"ids": ["sql", "chat"], "weights": [2, 1], "merge_strategy": "ties", "density": 0.3}
    first = client.post("/merge", json={**asked, "majority_sign_method": "total"})
    assert first.status_code == 200, first.text
    again = client.post("/merge", json={"name": "merge:sql*2+chat@ties,density=0.3"}).json()
    assert again["path"] == first.json()["path"] == str(resolver.resolve("merge:sql*2+chat@ties,density=0.3"))
    assert resolver.counts == {"built": 1, "cache": 2}
    sent = client.post("/merge", json={**asked, "format": "safetensors"})
    weights = (tmp_path / "cache" / again["path"].rpartition("/")[2] / "adapter_model.safetensors").read_bytes()
    assert sent.content == weights and json.loads(sent.headers["x-adapter-config"])["peft_type"] == "LORA"
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/adapters").json() == {"adapters": ["ads", "chat", "law", "math", "sql"]}
    told = client.get("/metrics").text
    assert (
        'merge_engine_merges_total{how="built"} 1\n' in told and f"merge_engine_cache_bytes {resolver.held()}" in told
    )


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[" * 10_000, 400),
        (b"3", 400),
        (b"x" * (LARGEST_BODY + 1), 400),
        ({}, 400),
        ({"ids": ["../secret"]}, 400),
        ({"ids": ["/etc"]}, 400),
        ({"ids": ["user/repo"]}, 400),
        ({"ids": [f"a{n}" for n in range(1000)]}, 400),
        ({"ids": ["sql"], "weights": [1e9]}, 400),
        ({"ids": ["sql"], "majority_sign_method": "frequency"}, 400),
        ({"ids": ["sql"], "format": "exe"}, 400),
        ({"ids": ["sql"], "name": "merge:sql"}, 400),
        ({"ids": ["sql", "chat"], "load": "x"}, 400),
        ({"ids": ["nobody"]}, 404),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_strangers_get_one_answer_each(served, tmp_path, body, status):
    client, resolver = client_of(served, tmp_path)
    sent = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = client.post("/merge", **sent)
    assert answer.status_code == status and list(answer.json()) == ["error"] and len(answer.text) < 500
    if isinstance(body, bytes) or "load" not in body:
        assert resolver.held() == 0


def test_a_token_guards_all_but_health(served, tmp_path):
    client, _ = client_of(served, tmp_path, token="secret")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        assert client.post("/merge", json={"ids": ["sql"]}, headers=headers).status_code == 401
        assert client.get("/metrics", headers=headers).status_code == 401
        assert client.get("/adapters", headers=headers).status_code == 401
    headers = {"Authorization": "Bearer secret"}
    assert client.post("/merge", json={"ids": ["sql", "chat"]}, headers=headers).status_code == 200
    assert client.get("/health").status_code == 200


class Server(BaseHTTPRequestHandler):
    """As vLLM's /v1/load_lora_adapter, which remembers what it was asked."""

    asked: ClassVar = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body))
        self.send_response(400 if body["lora_name"] == "known" else 200)
        self.end_headers()
        self.wfile.write(b"already loaded")

    def log_message(self, *_):
        """Nothing on the terminal."""


def test_it_loads_into_a_server(served, tmp_path):
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        client, _ = client_of(served, tmp_path, server=f"http://127.0.0.1:{server.server_port}/")
        answer = client.post("/merge", json={"ids": ["sql", "chat"], "load": "both"})
        assert answer.status_code == 200, answer.text
        wanted = {"lora_name": "both", "lora_path": answer.json()["path"]}
        assert Server.asked == [("/v1/load_lora_adapter", wanted)]
        refused = client.post("/merge", json={"ids": ["sql", "chat"], "load": "known"})
        assert refused.status_code == 413 and "answered 400: already loaded" in refused.text
    finally:
        server.shutdown()
        server.server_close()


def test_mistakes_on_the_command_line(served, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MERGE_ENGINE_TOKEN", raising=False)
    pytest.importorskip("uvicorn")
    for options, message in [
        (["--host", "0.0.0.0"], "host: 0.0.0.0 is open to others; wanted MERGE_ENGINE_TOKEN"),
        (["--builds", "0"], "builds: wanted a whole number of at least 1"),
        (["--limit", "much"], "limit: wanted a size"),
    ]:
        code, _, err = run_cli(capsys, "serve-adapters", served, "--cache", tmp_path / "cache", *options)
        assert code == 2 and err.startswith(f"merge-engine: error: --{message}")
