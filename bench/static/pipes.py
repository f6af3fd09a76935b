"""Which unit of a processor an instruction takes, and for how many lanes a clock.

From NVIDIA's tables of arithmetic throughput (CUDA Programming Guide, "Arithmetic Instructions") and Nsight Compute's
list of pipelines; AMD's vector units take 64 lanes a clock in all. What is not listed (branches, barriers, uniform
instructions) takes an issue slot and nothing else. Shared by all: the issue slots.
"""

from collections import Counter
from collections.abc import Mapping

_ALU = (
    "IADD VIADD LOP LOP3 LEA SHF SHL SHR ISETP ISET FSETP FSET SEL FSEL IMNMX VIMNMX FMNMX VHMNMX PRMT IABS PLOP3 "
    "P2R R2P ICMP FCHK BMSK SGXT FLO BREV LOP32I VABSDIFF VOTE MOV CS2R"
).split()
_XU = "MUFU I2F F2I F2F I2I POPC FRND".split()
_LSU = "LDG STG LDS STS LD ST ATOM ATOMG ATOMS RED REDG LDSM STSM SHFL LDGSTS MATCH LDL STL LDC".split()

# lanes a clock of one processor, by the first digits of the target
_LANES = {
    "sm_7": {"issue": 128, "ALU": 64, "FMA": 64, "IMAD": 64, "XU": 16, "LSU": 32},
    "sm_80": {"issue": 128, "ALU": 64, "FMA": 64, "IMAD": 64, "XU": 16, "LSU": 32},
    "sm_9": {"issue": 128, "ALU": 64, "FMA": 128, "IMAD": 64, "XU": 16, "LSU": 32},
    "sm_10": {"issue": 128, "ALU": 64, "FMA": 128, "IMAD": 64, "XU": 16, "LSU": 32},
    "sm_12": {"issue": 128, "ALU": 64, "FMA": 128, "IMAD": 128, "XU": 16, "LSU": 32},
    "gfx": {"VALU": 64, "SALU": 256, "LDS": 32, "VMEM": 64},
}


def lanes(target: str) -> Mapping[str, int]:
    """{pipe: lanes a clock} of a target."""
    return next(found for prefix, found in _LANES.items() if target.startswith(prefix))


def pipe_of(op: str) -> str | None:
    """The pipe of an instruction, beside the issue slots."""
    if op.startswith("v_"):
        return None if "mfma" in op else "VALU"
    if op.startswith("s_"):
        return "SALU"
    if op.startswith("ds_"):
        return "LDS"
    if op.startswith(("global_", "buffer_")):
        return "VMEM"
    name = op.split(".")[0]
    while name[-1:].isdigit() and name not in _ALU and name not in _XU and name not in _LSU:
        name = name[:-1]  # IADD3, FMUL2, VIMNMX3
    if name in ("FFMA", "FMUL", "FADD"):
        return "FMA"
    if name == "IMAD":
        return "IMAD"
    known = {"ALU": _ALU, "XU": _XU, "LSU": _LSU}
    return next((pipe for pipe, names in known.items() if name in names), None)


def clocks(opcodes: Mapping[str, int], target: str) -> dict[str, float]:
    """Clocks of one processor, by pipe, for one thread's instructions: the largest binds."""
    width = lanes(target)
    counts: Counter[str] = Counter()
    for op, count in opcodes.items():
        pipe = pipe_of(op)
        twice = 2 if op.startswith(("FMUL2", "FADD2", "FFMA2")) else 1
        if pipe is not None:
            counts[pipe] += count * twice
        if "issue" in width:
            counts["issue"] += count
    if "FMA" in width:  # IMAD takes the heavier half of the pipe of FFMA
        counts["FMA"] += counts["IMAD"]
    return {pipe: counts[pipe] / width[pipe] for pipe in width}
