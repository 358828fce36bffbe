"""What a compiled Triton kernel asks of a GPU, read from its machine code: registers, spills, memory, instructions.

The limits that the occupancy is computed from:

* sm_80, sm_90, sm_100: CUDA C++ Programming Guide, appendix "Compute Capabilities", table "Technical Specifications
  per Compute Capability", and for the allocation units the tuning guides of Ampere, Hopper and Blackwell. A block may
  use the shared memory of its multiprocessor less 1 KiB, which the system keeps for itself for each block.
* gfx942: AMD Instinct MI300 (CDNA3) instruction set architecture, chapters 2 and 3, and LLVM's AMDGPU usage guide:
  four SIMD units of 512 registers a lane (vector and accumulation registers together) and eight waves, 64 KiB of LDS.

NVIDIA's 64 Ki registers a multiprocessor are 512 a lane for each of its four schedulers, given out in eights, so that
one formula serves both.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LANE_REGISTERS = 512
"""Registers of a lane in each scheduler (SIMD unit), to be shared by the warps that it holds."""
REGISTER_UNIT = 8
SCHEDULERS = 4
TENSOR_MEMORY_COLUMNS = 512
"""Of a multiprocessor of sm_100, given out in powers of two, at least 32."""


@dataclass(frozen=True)
class Architecture:
    """Limits of an architecture. AMD calls a multiprocessor a compute unit, a warp a wave, a block a workgroup."""

    backend: str
    arch: int | str
    """As Triton's GPUTarget takes it."""
    warp_size: int
    warps: int
    """Most active warps of a multiprocessor."""
    blocks: int
    """Most active blocks of a multiprocessor."""
    shared: int
    """Bytes of shared memory of a multiprocessor."""
    shared_reserved: int
    """Bytes of it that the system takes for each block."""
    shared_unit: int
    """Bytes in whose multiples it is given out."""

    @property
    def shared_block(self) -> int:
        """Most bytes of shared memory that one block may use."""
        return self.shared - self.shared_reserved


ARCHITECTURES: Mapping[str, Architecture] = {
    "sm_80": Architecture("cuda", 80, 32, 64, 32, 164 << 10, 1 << 10, 128),
    "sm_90": Architecture("cuda", 90, 32, 64, 32, 228 << 10, 1 << 10, 128),
    "sm_100": Architecture("cuda", 100, 32, 64, 32, 228 << 10, 1 << 10, 128),
    "gfx942": Architecture("hip", "gfx942", 64, 32, 16, 64 << 10, 0, 512),
}


@dataclass(frozen=True)
class Load:
    """One instruction that loads from global memory."""

    line: int
    """In the source file of the kernel, or of the function that it calls; 0 where the compiler says none."""
    bits: int
    """A lane; 128 for a bulk copy of the tensor memory accelerator."""


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses. Equal kernels give equal resources: it may be kept as a golden file."""

    registers: int
    """A thread; on gfx942 vector and accumulation registers together."""
    spills: int
    """32-bit words a thread stores for want of registers; scalars kept in lanes of vectors are not counted."""
    stack: int
    """Bytes a thread."""
    shared: int
    """Bytes of shared memory a block."""
    tensor_memory: int
    """Columns of tensor memory a block; 0 before sm_100."""
    warps: int
    """A block."""
    fits: bool
    """Whether a block can run at all: its shared and tensor memory are within the limits."""
    occupancy: float
    """Active warps of a multiprocessor as a fraction of the most that it can hold; 0 where a block does not fit."""
    dots: int
    """Matrix products of the program; `tf32x3` and its like count as the several that they are made of."""
    scalar_dots: int
    """Those that became multiplications of single numbers, without matrix instructions."""
    matrix_instructions: int
    loads: tuple[Load, ...]


def occupancy(architecture: Architecture, registers: int, shared: int, warps: int, columns: int = 0) -> float:
    """Active warps over the most possible, for blocks of `warps` warps.

    Of the limits on the blocks of a multiprocessor (warps, blocks, registers, shared memory, tensor memory) the least
    counts.
    """
    lane_registers = max(REGISTER_UNIT, math.ceil(registers / REGISTER_UNIT) * REGISTER_UNIT)
    limits = [
        architecture.blocks if warps > 1 or architecture.backend == "cuda" else architecture.warps,
        min(architecture.warps, SCHEDULERS * (LANE_REGISTERS // lane_registers)) // warps,
    ]
    unit = architecture.shared_unit
    block = math.ceil(shared / unit) * unit + architecture.shared_reserved
    if block:
        limits.append(architecture.shared // block)
    if columns:
        limits.append(TENSOR_MEMORY_COLUMNS // max(32, 1 << (columns - 1).bit_length()))
    return min(limits) * warps / architecture.warps


def read(target: str, compiled: Any) -> Resources:
    """The resources of what `kernel.warmup` returned for the architecture `target`, a key of ARCHITECTURES."""
    architecture = ARCHITECTURES[target]
    metadata, code = compiled.metadata, compiled.asm
    machine = _nvidia(code["cubin"]) if architecture.backend == "cuda" else _amd(code["amdgcn"])
    shared = int(metadata.shared)
    columns = int(getattr(metadata, "tmem_size", 0) or 0)
    active = occupancy(architecture, machine.registers, shared, metadata.num_warps, columns)
    fits = shared <= architecture.shared_block and columns <= TENSOR_MEMORY_COLUMNS
    return Resources(
        **vars(machine),
        shared=shared,
        tensor_memory=columns,
        warps=int(metadata.num_warps),
        fits=fits,
        occupancy=active if fits else 0.0,
        dots=len(_DOT.findall(code["ttgir"])),
        scalar_dots=scalar_dots(code["ttgir"]),
    )


_DOT = re.compile(r"\b(?:tt\.dot(?:_scaled)?|ttng\.warp_group_dot|ttng\.tc_gen5_mma(?:_scaled)?) ")


def scalar_dots(ttgir: str) -> int:
    """Matrix products left to scalar instructions, in a program of Triton's GPU dialect.

    The pass that gives each product the layout of a matrix instruction leaves those that it has none for in a blocked
    layout; lowered, they are loops of fused multiply-adds.
    """
    blocked = set(re.findall(r"^(#\w+) = #ttg\.blocked<", ttgir, re.M))
    layouts = re.findall(r"\btt\.dot .*-> tensor<[^,>]*, (#\w+)>", ttgir)
    return sum(layout in blocked for layout in layouts)


@dataclass(frozen=True)
class _Machine:
    """What the machine code alone tells."""

    registers: int
    spills: int
    stack: int
    matrix_instructions: int
    loads: tuple[Load, ...]


_SASS_LINE = re.compile(r'//## File ".*", line (\d+)')
_SASS_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)((?:\.\w+)*)")
_SASS_LOADS = {"LDG", "LDGSTS", "UTMALDG", "UBLKCP"}
_SASS_BULK = {"UTMALDG", "UBLKCP"}


def _nvidia(cubin: bytes) -> _Machine:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        listing = _tool("nvdisasm", "--print-line-info", "--print-code", file.name)
    instructions = tuple(_sass(listing))
    return _Machine(
        registers=_number(r"REG:(\d+)", usage),
        spills=sum(_sass_bits(modifiers) // 32 for _, name, modifiers in instructions if name == "STL"),
        stack=_number(r"STACK:(\d+)", usage),
        matrix_instructions=sum(name.endswith("MMA") for _, name, _ in instructions),
        loads=tuple(
            Load(line, 128 if name in _SASS_BULK else _sass_bits(modifiers))
            for line, name, modifiers in instructions
            if name in _SASS_LOADS
        ),
    )


def _sass(listing: str) -> Iterator[tuple[int, str, frozenset[str]]]:
    """Source line, name and modifiers of each instruction of a listing of nvdisasm."""
    line = 0
    for text in listing.splitlines():
        if found := _SASS_LINE.search(text):
            line = int(found[1])
        elif found := _SASS_INSTRUCTION.match(text):
            yield line, found[1], frozenset(found[2].split("."))


def _sass_bits(modifiers: frozenset[str]) -> int:
    """Bits a lane of a load or store: a number alone among the modifiers, a narrow type, or else one register."""
    for modifier, bits in {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}.items():
        if modifier in modifiers:
            return bits
    return 32


_GCN_LINE = re.compile(r"^\s*\.loc\s+\d+ (\d+)")
_GCN_LOAD = re.compile(r"^\s*(?:global|buffer|flat)_load_(?:lds_)?(\w+)")
_GCN_BITS = {
    "dwordx4": 128,
    "dwordx3": 96,
    "dwordx2": 64,
    "dword": 32,
    "ushort": 16,
    "sshort": 16,
    "short": 16,
}


def _amd(assembly: str) -> _Machine:
    loads, line = [], 0
    for text in assembly.splitlines():
        if found := _GCN_LINE.match(text):
            line = int(found[1])
        elif found := _GCN_LOAD.match(text):
            loads.append(Load(line, _GCN_BITS.get(found[1].split("_")[0], 8)))
    return _Machine(
        registers=_number(r"\.vgpr_count:\s*(\d+)", assembly),
        spills=_number(r"\.vgpr_spill_count:\s*(\d+)", assembly),
        stack=_number(r"\.private_segment_fixed_size:\s*(\d+)", assembly),
        matrix_instructions=len(re.findall(r"^\s*v_mfma_", assembly, re.M)),
        loads=tuple(loads),
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in what the compiler's tools print")
    return int(found[1])


def _tool(name: str, *arguments: str) -> str:
    """Output of one of the tools for NVIDIA's binaries that Triton brings along."""
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout
