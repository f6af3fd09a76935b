"""merge-engine info: ranks, scalings, size and norms of adapters, or which backend is used on this machine."""

import argparse
from typing import Any

from merge_engine.cli.options import add_command
from merge_engine.errors import RecipeError

INFO_EXAMPLES = """\
examples:
  merge-engine info sql
  merge-engine info --system
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(commands, "info", run, INFO_EXAMPLES, "show ranks, scalings, size and norms of adapters")
    parser.add_argument("adapters", nargs="*", metavar="adapter", help="adapter folder, .safetensors file or hub id")
    parser.add_argument("--system", action="store_true", help="show which backend is used on this machine, and why")


def run(options: argparse.Namespace) -> None:
    from merge_engine.engine.choose_backend import system
    from merge_engine.formats.open import open_adapter
    from merge_engine.lowrank.small_svd import product_norm

    if options.system:
        print(system())
    elif not options.adapters:
        raise RecipeError("info: wanted an adapter or --system, got neither")
    for source in options.adapters:
        adapter = open_adapter(source)
        adapter.check_finite()
        ranks = sorted({module.rank for module in adapter.modules.values()})
        print(f"{adapter.name}: {adapter.path}")
        print(f"  base model  {adapter.base_model}")
        print(f"  modules     {len(adapter.modules)}, rank {', '.join(map(str, ranks))}")
        print(f"  size        {adapter.size_bytes / 1e6:.2f} MB")
        if adapter.extras:
            print(f"  others      {', '.join(adapter.extras)}")
        width = max(map(len, adapter.modules))
        print(f"  {'module':{width}}  {'kind':9}  {'delta':>15}  rank  scaling  norm of delta")
        for module in adapter.modules.values():
            A, B = adapter.factors(module.name)
            shape = f"{module.rows} x {module.columns}"
            norm = abs(module.scaling) * product_norm(A, B)
            print(
                f"  {module.name:{width}}  {module.kind:9}  {shape:>15}  {module.rank:4}  "
                f"{module.scaling:7.4g}  {norm:.4g}"
            )
