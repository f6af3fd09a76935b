"""merge-engine serve-adapters: merged adapters over HTTP."""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merge_engine.cli.options import add_command
from merge_engine.errors import RecipeError, some

SERVE_EXAMPLES = """\
examples:
  merge-engine serve-adapters ADAPTERS --cache CACHE --limit 20GB
  curl localhost:8090/merge -d '{"ids": ["sql", "chat"], "weights": [2, 1], "method": "ties", "density": 0.2}'
  curl localhost:8090/merge -d '{"name": "merge:sql*2+chat@ties,density=0.2", "format": "safetensors"}' -o m.safetensors

The token, if there is one, is in the environment: MERGE_ENGINE_TOKEN.
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(commands, "serve-adapters", run, SERVE_EXAMPLES, "merge adapters on request, over HTTP")
    add = parser.add_argument
    add("adapters", type=Path, help="folder of the adapter folders that may be merged")
    add("--cache", type=Path, required=True, help="folder for the results")
    add("--limit", default="20GB", metavar="SIZE", help="what the cache may hold; default: 20GB")
    add("--max-rank", type=int, metavar="R", help="the largest rank of a result; default: any")
    add("--builds", type=int, default=1, metavar="N", help="merges at once; default: 1")
    add("--timeout", type=float, default=120.0, metavar="SECONDS", help="limit of a request; default: 120")
    add("--load-into", metavar="URL", help="server whose /v1/load_lora_adapter is called for requests with load")
    add("--host", default="127.0.0.1", help="address to listen on; default: this machine only")
    add("--port", type=int, default=8090, help="default: 8090")


def run(options: argparse.Namespace) -> None:
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise RecipeError(f"serve-adapters: needs {' and '.join(missing)}; wanted: pip install 'merge-engine[serve]'")
    import uvicorn

    from merge_engine.serve.resolver import Resolver
    from merge_engine.serve.service import make_app

    if options.builds < 1:
        raise RecipeError(f"builds: wanted a whole number of at least 1, got {options.builds}")
    token = os.environ.get("MERGE_ENGINE_TOKEN") or None
    if options.host not in ("127.0.0.1", "localhost", "::1") and token is None:
        raise RecipeError(
            f"host: {options.host} is open to others; wanted MERGE_ENGINE_TOKEN in the environment with it"
        )
    resolver = Resolver(
        options.adapters, options.cache, limit=options.limit, builds=options.builds, waiting=options.timeout,
        max_rank=options.max_rank,
    )  # fmt: skip
    print(f"merge-engine: {some(len(resolver.names()), 'adapter')} on {options.host}:{options.port}", file=sys.stderr)
    app = make_app(resolver, token=token, server=options.load_into, timeout=options.timeout)
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")
