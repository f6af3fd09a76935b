"""merge-engine info: ranks, scalings, size and norms of adapters, or which backend is used on this machine."""

import argparse
import json
from typing import Any

from merge_engine.cli.options import add_command
from merge_engine.errors import RecipeError, printable

INFO_EXAMPLES = """\
examples:
  merge-engine info sql
  merge-engine info sql --json
  merge-engine info --system
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(commands, "info", run, INFO_EXAMPLES, "show ranks, scalings, size and norms of adapters")
    parser.add_argument("adapters", nargs="*", metavar="adapter", help="adapter folder, .safetensors file or hub id")
    parser.add_argument("--system", action="store_true", help="show which backend is used on this machine, and why")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    from merge_engine.engine.choose_backend import system

    if not (options.system or options.adapters):
        raise RecipeError("info: wanted an adapter or --system, got neither")
    facts = system() if options.system else None
    adapters = [_figures(source) for source in options.adapters]
    if options.json:
        print(json.dumps(({"system": facts} if facts else {}) | ({"adapters": adapters} if adapters else {})))
        return
    if facts:
        width = max(map(len, facts))
        print("\n".join(f"{name:{width}}  {fact}" for name, fact in facts.items()))
    for each in adapters:
        _show(each)


def _figures(source: str) -> dict[str, Any]:
    """What there is to say of an adapter; raises AdapterError where it cannot be read or a number is not finite."""
    from merge_engine.formats.open import open_adapter
    from merge_engine.lowrank.small_svd import product_norm

    adapter = open_adapter(source)
    adapter.check_finite()
    modules = [
        {
            "module": module.name,
            "kind": module.kind,
            "rows": module.rows,
            "columns": module.columns,
            "rank": module.rank,
            "scaling": module.scaling,
            "norm": None  # of DoRA the base decides
            if module.name in adapter.magnitudes
            else abs(module.scaling) * product_norm(*adapter.factors(module.name)),
        }
        for module in adapter.modules.values()
    ]
    return {
        "name": adapter.name,
        "path": str(adapter.path),
        "family": str(adapter.family),
        "base_model": adapter.base_model,
        "bytes": adapter.size_bytes,
        "others": sorted(adapter.extras),
        "modules": modules,
    }


def _show(adapter: dict[str, Any]) -> None:
    from merge_engine.runtime.memory import size_text

    modules = [{**module, "module": printable(module["module"])} for module in adapter["modules"]]
    ranks = sorted({module["rank"] for module in modules})
    print(printable(f"{adapter['name']}: {adapter['path']}"))
    print(f"  family      {adapter['family']}")
    print(printable(f"  base model  {adapter['base_model']}"))
    print(f"  modules     {len(modules)}, rank {', '.join(map(str, ranks))}")
    print(f"  size        {size_text(adapter['bytes'])}")
    if adapter["others"]:
        print(f"  others      {', '.join(map(printable, adapter['others']))}")
    width = max((len(module["module"]) for module in modules), default=6)
    print(f"  {'module':{width}}  {'kind':9}  {'delta':>15}  rank  scaling  norm of delta")
    for module in modules:
        shape = f"{module['rows']} x {module['columns']}"
        norm = "DoRA" if module["norm"] is None else f"{module['norm']:.4g}"
        print(
            f"  {module['module']:{width}}  {module['kind']:9}  {shape:>15}  {module['rank']:4}  "
            f"{module['scaling']:7.4g}  {norm}"
        )
