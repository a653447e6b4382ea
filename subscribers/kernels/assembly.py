"""What a GPU would run, without one: kernels compiled ahead of time, and what they need of a multiprocessor.

Assembler and disassembler are those that Triton brings along.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

__all__ = ["ARCHITECTURES", "Program", "ladder", "tensor_cores"]

ARCHITECTURES = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0)}
"""Compute capabilities by name: A100, H100, B200."""
REGISTERS, THREADS = 65536, 2048
"""Of a multiprocessor, in all three."""
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}
"""Bytes of shared memory of a multiprocessor; every block takes 1 KB more than it asks for."""
TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA")
"""Instructions of sm_80, sm_90 and sm_100 that multiply tiles."""


@dataclass(frozen=True, slots=True)
class Program:
    """A kernel compiled for an architecture."""

    kernel: str
    dtype: str
    architecture: str
    threads: int
    """In a block."""
    registers: int
    """Of a thread."""
    stack: int
    """Bytes of a thread that did not fit its registers."""
    shared: int
    """Bytes of a block."""
    instructions: Counter[str]
    """How often each machine instruction is in the code, with its modifiers: `LDG.E.128`."""
    ptx: str

    @property
    def spills(self) -> int:
        """Instructions that move registers to memory and back."""
        return self.count("STL", "LDL")

    @property
    def blocks(self) -> int:
        """How many a multiprocessor has room for at once."""
        return min(
            REGISTERS // (self.registers * self.threads),
            SHARED[self.architecture] // (self.shared + 1024),
            THREADS // self.threads,
        )

    @property
    def fused(self) -> int:
        """Multiply-adds of floats, of which one instruction of sm_100 does two."""
        return self.count("FFMA", "DFMA") + 2 * self.count("FFMA2")

    @property
    def tensor(self) -> int:
        """Instructions of the tensor cores."""
        return self.count(*TENSOR_CORE)

    def count(self, *names: str, modifier: str = "") -> int:
        """Of the instructions so called, those that have the modifier."""
        split = ((one.split("."), times) for one, times in self.instructions.items())
        return sum(times for (name, *rest), times in split if name in names and (not modifier or modifier in rest))


def ladder(kernel: str, dtype: str, architecture: str) -> Program:
    """`cuda-naive`, `cuda-tiled` or `cuda-register`."""
    from . import cuda_ladder

    ptx = cuda_ladder.ptx(kernel, dtype, ARCHITECTURES[architecture])
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        _tool("ptxas-blackwell", f"-arch={architecture}", str(source), "-o", str(cubin))
        return _read(kernel, dtype, architecture, cuda_ladder.threads(kernel, dtype), ptx, cubin.read_bytes())


def tensor_cores(dtype: str, architecture: str) -> Program:
    """`triton`, with the tile that suits big square matrices."""
    from . import tensor_cores

    compiled = tensor_cores.compiled(dtype, ARCHITECTURES[architecture])
    threads, dynamic = compiled.metadata.num_warps * 32, compiled.metadata.shared
    return _read("triton", dtype, architecture, threads, compiled.asm["ptx"], compiled.asm["cubin"], dynamic)


def _read(
    kernel: str, dtype: str, architecture: str, threads: int, ptx: str, cubin: bytes, shared: int | None = None
) -> Program:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", _tool("cuobjdump", "-res-usage", file.name)))
        listing = _tool("nvdisasm", "-c", file.name)
    instructions = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z][A-Z0-9_.]*)", listing, re.MULTILINE))
    static = int(usage["SHARED"])
    registers, stack = int(usage["REG"]), int(usage["STACK"])
    return Program(
        kernel, dtype, architecture, threads, registers, stack, static if shared is None else shared, instructions, ptx
    )


def _tool(name: str, *arguments: str) -> str:
    package = find_spec("triton")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError(f"{name} comes with triton: pip install 'redis-ml-pipeline[cuda]'")
    path = Path(package.submodule_search_locations[0], "backends", "nvidia", "bin", name)
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name} {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
