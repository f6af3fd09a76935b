"""Reads machine code: resources, instructions, and the loop of a kernel."""

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

from triton import knobs


class Resources(NamedTuple):
    """registers: per thread. spill_bytes: memory that a thread uses only to spill. static_bytes: of shared memory."""

    registers: int
    spill_bytes: int
    static_bytes: int


class Code(NamedTuple):
    """instructions: (opcode, the rest, a predicate first). jumps: {index of a branch: index that it jumps to}."""

    instructions: list[tuple[str, str]]
    jumps: dict[int, int]


def nvidia_resources(binary: Any) -> Resources:
    """From cuobjdump, for a compiled kernel of Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        dump = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", dump)}
    return Resources(usage["REG"], usage["STACK"] + usage["LOCAL"], usage["SHARED"])


def amd_resources(binary: Any) -> Resources:
    """From the assembly; registers are vector registers, and spills go to scratch memory.

    A spilled scalar register is kept in a lane of a vector register, and takes no memory. All shared memory is in
    Triton's metadata, none is static.
    """
    text = binary.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise ValueError(f"the assembly has no .{name}")
        return int(found.group(1))

    spilled = 4 * number("vgpr_spill_count") + number("private_segment_fixed_size")
    return Resources(number("vgpr_count"), spilled, 0)


_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)(.*?);")
_SASS_BYTES = 16  # an instruction
_LABEL = re.compile(r"^\s*(\.L\w+):")
_GCN = re.compile(r"^\s+((?:s|v|ds|global|buffer)_\w+)(.*)$")


def nvidia_code(binaries: Sequence[Any]) -> list[Code]:
    """The instructions of compiled kernels of Triton for one target.

    They are disassembled together: nvdisasm takes longer to start than to disassemble a hundred kernels.
    """
    architecture = re.search(r"\.target sm_(\w+)", binaries[0].asm["ptx"])
    if architecture is None:
        raise ValueError("the PTX names no target")
    sections = [_code_section(binary.asm["cubin"]) for binary in binaries]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(sections))
        file.flush()
        lines = _run(knobs.nvidia.nvdisasm.path, "-b", f"SM{architecture[1]}", file.name).splitlines()
    found = [match for match in map(_SASS.match, lines) if match]
    if len(found) * _SASS_BYTES != sum(map(len, sections)):
        raise ValueError(f"nvdisasm: wanted an instruction for every {_SASS_BYTES} bytes, got {len(found)}")
    codes, start = [], 0
    for section in sections:
        end = start + len(section) // _SASS_BYTES
        instructions = [(match[2], f"{match[1] or ''}{match[3]}") for match in found[start:end]]
        jumps = {}
        for i, (op, rest) in enumerate(instructions):
            target = re.search(r"0x([0-9a-f]+)\s*$", rest)
            if op.startswith("BRA") and target:
                jumps[i] = int(target[1], 16) // _SASS_BYTES - start
        codes.append(Code(instructions, jumps))
        start = end
    return codes


def _code_section(cubin: bytes) -> bytes:
    """The machine code of a cubin with one kernel: the section .text.* of an ELF file of 64 bits."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    sections = [struct.unpack_from("<2I4Q", cubin, headers + i * size) for i in range(count)]
    found = []
    for name, _, _, _, offset, nbytes in sections:
        if cubin.startswith(b".text.", sections[names][4] + name):
            found.append(cubin[offset : offset + nbytes])
    if len(found) != 1:
        raise ValueError(f"wanted a cubin with one kernel, got {len(found)}")
    return found[0]


def amd_code(binary: Any) -> Code:
    """The instructions of a compiled kernel of Triton."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in binary.asm["amdgcn"].splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := _GCN.match(line):
            instructions.append((instruction[1], instruction[2]))
    jumps = {}
    for i, (op, rest) in enumerate(instructions):
        target = re.search(r"(\.L\w+)", rest)
        if op.startswith(("s_cbranch", "s_branch")) and target and target[1] in labels:
            jumps[i] = labels[target[1]]
    return Code(instructions, jumps)


def loops_of(code: Code, count: int = 1) -> tuple[set[int], set[int]]:
    """(hot, cold) instructions of the `count` longest loops; cold are those that a forward branch within may skip.

    An inner loop (over recipes, or over steps of a rank above 64) is hot, and counted once: as for one recipe or step.
    Code after the last exit is out of line (waits on barriers), and a branch back from there closes no loop.
    """
    code_end = len(code.instructions)
    exits = (i for i, (op, rest) in enumerate(code.instructions) if op in ("EXIT", "s_endpgm") and "@" not in rest)
    end = next(exits, code_end)
    hot: set[int] = set()
    cold: set[int] = set()
    longest = sorted(((target - i, target, i) for i, target in code.jumps.items() if target <= i < end))
    for _, first, last in longest:
        if count and not hot & set(range(first, last + 1)):
            count -= 1
            skipped = _skipped(code, first, last)
            hot |= set(range(first, last + 1)) - skipped
            cold |= skipped
    return hot, cold


def _skipped(code: Code, first: int, last: int) -> set[int]:
    """What forward branches in a loop may skip, but for inner loops and products, which are never rare."""
    skipped: set[int] = set()
    for i, target in code.jumps.items():
        skips_work = any(i < back <= j < target for j, back in code.jumps.items())
        skips_work |= any(re.search("mma|mfma", op.lower()) for op, _ in code.instructions[i:target])
        if first <= i < target <= last + 1 and _is_conditional(*code.instructions[i]) and not skips_work:
            skipped.update(range(i + 1, target))
    return skipped


def _is_conditional(op: str, rest: str) -> bool:
    """Whether a branch depends on a predicate (P0, UP1) or, on AMD, on a condition code."""
    return op.startswith("s_cbranch") or "@" in rest or "P" in rest


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
