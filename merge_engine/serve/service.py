"""The HTTP service: POST /merge answers with the folder or the bytes of a merge; /health, /adapters, /metrics."""

import asyncio
import hmac
import json
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_engine.errors import AdapterError, MergeError, OutputError, RecipeError
from merge_engine.serve.names import Wanted, parse_name, wanted_of
from merge_engine.serve.resolver import BusyError, Resolver

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

LARGEST_BODY = 1 << 14  # bytes of a request
# LoRAX's names for fields of a request and for methods; elsewhere the names are this package's.
_LORAX_KEYS = {"ids": "adapters", "merge_strategy": "method"}
_STATUS: dict[type[MergeError], int] = {BusyError: 503, AdapterError: 404, OutputError: 413, RecipeError: 400}


def make_app(
    resolver: Resolver, *, token: str | None = None, server: str | None = None, timeout: float = 120.0
) -> "Starlette":
    """The application. token: that every request but /health has as ``Authorization: Bearer``; None: none.

    server: address of a vLLM or SGLang server, whose /v1/load_lora_adapter is called where a request says load.
    timeout: seconds for a request, then 504; a merge under way goes on, and the next request finds it.
    """
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, PlainTextResponse
    from starlette.routing import Route

    statuses: Counter[int] = Counter()

    def answer(status: int, **body: Any) -> "Response":
        statuses[status] += 1
        return JSONResponse(body, status)

    def allowed(request: "Request") -> bool:
        sent = request.headers.get("authorization", "")
        return token is None or hmac.compare_digest(sent.encode(), f"Bearer {token}".encode())

    async def merge(request: "Request") -> "Response":
        if not allowed(request):
            return answer(401, error="authorization: wanted a bearer token")
        try:
            body = await _body(request)
            wanted, load, as_bytes = _wanted(body)
            started = time.perf_counter()
            path = await asyncio.wait_for(asyncio.to_thread(resolver.find, wanted), timeout)
            if load is not None:
                if server is None:
                    raise RecipeError("load: the service was started without a server to load into")
                await asyncio.to_thread(load_into, server, load, path, timeout)
        except MergeError as error:
            resolver.refused()
            return answer(next(s for kind, s in _STATUS.items() if isinstance(error, kind)), error=str(error))
        except asyncio.TimeoutError:
            return answer(504, error=f"timeout: not done in {timeout:g} s; ask again")
        if as_bytes:
            statuses[200] += 1
            return _file(path)
        seconds = round(time.perf_counter() - started, 4)
        return answer(200, name=wanted.name, path=str(path), seconds=seconds, loaded=load)

    async def health(_: "Request") -> "Response":
        return JSONResponse({"status": "ok"})

    async def adapters(request: "Request") -> "Response":
        if not allowed(request):
            return answer(401, error="authorization: wanted a bearer token")
        return answer(200, adapters=resolver.names())

    async def metrics(request: "Request") -> "Response":
        if not allowed(request):
            return answer(401, error="authorization: wanted a bearer token")
        lines = [f'merge_engine_merges_total{{how="{how}"}} {count}' for how, count in sorted(resolver.counts.items())]
        lines += [f'merge_engine_responses_total{{status="{s}"}} {count}' for s, count in sorted(statuses.items())]
        lines += [f"merge_engine_cache_bytes {resolver.held()}", f"merge_engine_cache_limit_bytes {resolver.limit}"]
        return PlainTextResponse("\n".join(lines) + "\n")

    return Starlette(
        routes=[
            Route("/merge", merge, methods=["POST"]),
            Route("/adapters", adapters),
            Route("/metrics", metrics),
            Route("/health", health),
        ]
    )


def load_into(server: str, name: str, path: Path, timeout: float) -> None:
    """Call a server's ``/v1/load_lora_adapter``. Raises OutputError where it does not take the adapter."""
    data = json.dumps({"lora_name": name, "lora_path": str(path)}).encode()
    address = f"{server.rstrip('/')}/v1/load_lora_adapter"
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            return
    except urllib.error.HTTPError as error:
        said = error.read(500).decode(errors="replace")
        raise OutputError(f"load: {address} answered {error.code}: {' '.join(said.split())}") from error
    except OSError as error:
        raise OutputError(f"load: {address} cannot be reached: {error}") from error


async def _body(request: "Request") -> dict[str, Any]:
    """The JSON of a request. Raises RecipeError where it is too large, or no table."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > LARGEST_BODY:
            raise RecipeError(f"body: wanted up to {LARGEST_BODY} bytes")
    try:
        body = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"body: wanted JSON: {error}") from error
    if not isinstance(body, dict):
        raise RecipeError(f"body: wanted a table, got {type(body).__name__}")
    return body


def _wanted(body: dict[str, Any]) -> tuple[Wanted, str | None, bool]:
    """(the merge, the name under which a server loads it or None, whether to answer with bytes)."""
    fields: dict[str, Any] = {_LORAX_KEYS.get(key, key): value for key, value in body.items() if value is not None}
    majority = fields.pop("majority_sign_method", "total")
    if majority != "total":
        raise RecipeError(f"majority_sign_method: wanted total, got {str(majority)[:80]!r}")
    load, form = fields.pop("load", None), fields.pop("format", "path")
    if form not in ("path", "safetensors"):
        raise RecipeError(f"format: wanted path or safetensors, got {str(form)[:80]!r}")
    if load is not None and (not isinstance(load, str) or not 0 < len(load) <= 512):
        raise RecipeError("load: wanted a name of up to 512 letters")
    name = fields.pop("name", None)
    if name is not None:
        if fields:
            raise RecipeError(f"name: wanted it alone, got {', '.join(map(str, fields))[:80]} too")
        return parse_name(name), load, form == "safetensors"
    return wanted_of(fields.pop("adapters", None), fields.pop("weights", None), fields), load, form == "safetensors"


def _file(path: Path) -> "Response":
    from starlette.responses import FileResponse

    config = (path / "adapter_config.json").read_text(encoding="utf-8")
    headers = {"X-Adapter-Config": json.dumps(json.loads(config))}
    return FileResponse(path / "adapter_model.safetensors", media_type="application/octet-stream", headers=headers)
