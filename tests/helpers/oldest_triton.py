"""Compile every kernel with a Triton that is not the one installed, and find none that spills: for `.ci/run`.

    python tests/helpers/oldest_triton.py VERSION [TARGET ...]     (by default sm_90 and gfx942)

The interpreter and newer compilers accept programs that the oldest compiler refuses, and each allots registers anew.
"""

import sys

import triton

from bench.static.cost import resources
from bench.static.kernels import SEARCH, SELECTIONS, Case

CASES = [
    *(Case(name) for name in ("terms", *SEARCH, *SELECTIONS)),
    *(Case(name, "fp32") for name in ("count", "collect", "finish")),
    Case("ties"),
    Case("dare_ties"),
    Case("vote_balance"),
    Case("ties", "fp32"),
    Case("ties, unequal weights", "fp16", rank=0, base=True),
    Case("breadcrumbs_ties, frequency"),
    Case("elect_max", "fp32", base=True),
    Case("consensus", "fp32", recipes=2),
    Case("dare_ties, mergekit", rank=48, aligned=False, ones=("M",)),
]


def main(version: str, *targets: str) -> None:
    if triton.__version__ != version:
        sys.exit(f"wanted Triton {version}, got {triton.__version__}")
    targets = targets or ("sm_90", "gfx942")
    spilled = [(target, case) for target in targets for case in CASES if resources(case, target).spill_bytes]
    if spilled:
        sys.exit(f"spilled on Triton {version}: {spilled}")
    print(f"{len(CASES)} kernels compile on Triton {version} for {', '.join(targets)}, and none spills")


if __name__ == "__main__":
    main(*sys.argv[1:])
