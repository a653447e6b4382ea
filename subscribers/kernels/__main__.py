"""`python -m subscribers.kernels`: what there is here; `--report [FILE]`: what the GPU's kernels need, compiled now."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import KERNELS
from .assembly import ARCHITECTURES, Program, ladder, tensor_cores

__all__ = ["programs", "table", "update"]

LADDER = ("cuda-naive", "cuda-tiled", "cuda-register")
TENSOR_DTYPES = ("float16", "bfloat16", "float32")
BEGIN, END = "<!-- generated: python -m subscribers.kernels --report docs/kernels.md -->\n", "<!-- end -->\n"
HEADER = (
    "| kernel | dtype | architecture | threads | registers | stack, B | spills | shared, B | blocks | FMA "
    "| tensor core | global, of them 128-bit | shared, of them 128-bit | barriers | instructions |\n|"
    + "---|" * 15
    + "\n"
)


def programs(architecture: str) -> list[Program]:
    """Every kernel of the GPU, the ladder in float32, compiled for one of `ARCHITECTURES`."""
    return [
        *(ladder(kernel, "float32", architecture) for kernel in LADDER),
        *(tensor_cores(dtype, architecture) for dtype in TENSOR_DTYPES),
    ]


def table() -> str:
    """Markdown, a row a kernel and architecture."""
    compiled = [programs(architecture) for architecture in ARCHITECTURES]
    return HEADER + "".join(_row(program) for row in zip(*compiled, strict=True) for program in row)


def update(text: str) -> str:
    """A document with its table made anew. Raises ValueError if it has no place for one."""
    before, found, rest = text.partition(BEGIN)
    _, ends, after = rest.partition(END)
    if not (found and ends):
        raise ValueError(f"the document has no table to replace, between {BEGIN.strip()!r} and {END.strip()!r}")
    return before + BEGIN + table() + END + after


def main() -> None:
    parser = argparse.ArgumentParser("python -m subscribers.kernels", description=__doc__)
    parser.add_argument("--report", nargs="?", const="-", metavar="FILE", help="print the table, or put it into FILE")
    options = parser.parse_args()
    if options.report is None:
        for kernel in KERNELS.values():
            print(f"{kernel.name:15} {kernel.device:5} {kernel.unavailable() or ', '.join(kernel.dtypes)}")
    elif options.report == "-":
        print(table(), end="")
    else:
        path = Path(options.report)
        path.write_text(update(path.read_text()))


def _row(program: Program) -> str:
    dtype = "float32 as TF32" if (program.kernel, program.dtype) == ("triton", "float32") else program.dtype
    reads, tiles = ("LDG", "LDGSTS", "STG"), ("LDS", "STS", "LDSM")
    cells = (
        f"`{program.kernel}`",
        dtype,
        program.architecture,
        program.threads,
        program.registers,
        program.stack,
        program.spills,
        f"{program.shared:,}",
        program.blocks,
        program.fused,
        program.tensor,
        f"{program.count(*reads)}, {program.count(*reads, modifier='128')}",
        f"{program.count(*tiles)}, {program.count(*tiles, modifier='128')}",
        program.count("BAR"),
        f"{program.instructions.total():,}",
    )
    return "| " + " | ".join(map(str, cells)) + " |\n"


if __name__ == "__main__":
    main()
