"""Compile every kernel with the oldest Triton that is supported, whose version is the argument: for `.ci/run`.

The interpreter and newer compilers accept programs that the oldest compiler refuses.
"""

import sys

import triton

from bench.static.kernels import SEARCH, SELECTIONS, Case, compiled, launch_of

CASES = [
    *(Case(name) for name in ("terms", *SEARCH, *SELECTIONS)),
    Case("vote_balance"),
    Case("ties", "fp32"),
    Case("ties, unequal weights", "fp16", rank=0, base=True),
    Case("breadcrumbs_ties, frequency"),
    Case("elect_max", "fp32", base=True),
    Case("consensus", "fp32", recipes=2),
    Case("dare_ties, mergekit", rank=48, aligned=False, ones=("M",)),
]


def main(version: str) -> None:
    if triton.__version__ != version:
        sys.exit(f"wanted Triton {version}, got {triton.__version__}")
    for target in ("sm_90", "gfx942"):
        for case in CASES:
            compiled(case, target, launch_of(case, target))
    print(f"{len(CASES)} kernels compile on Triton {version}")


if __name__ == "__main__":
    main(*sys.argv[1:])
