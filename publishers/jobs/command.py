"""`pipeline matmul a.npy b.npy -o c.npy`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import click

from pipeline import Pipeline
from pipeline.catalog import MatmulResult, TileProgress
from pipeline.cli import Number

from .asking import multiply

__all__ = ["matmul"]


class _Operand(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.2
    """A .npy file, or a .safetensors file and perhaps the name of one of its tensors, after a colon."""

    name = "file[:tensor]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Path, str]:
        if not isinstance(value, str):
            return (Path(value[0]), value[1])
        path, _, name = value.partition(".safetensors:")
        file = Path(f"{path}.safetensors" if name else value)
        if not file.is_file():
            self.fail(f"there is no file {str(file)!r}", param, ctx)
        return file, name


@click.command()
@click.argument("a", type=_Operand())
@click.argument("b", type=_Operand())
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="where the product is to be")
@click.option("-c", "c", type=_Operand(), help="C of alpha · A · B + beta · C")
@click.option("--alpha", type=Number(), default=1.0, show_default=True)
@click.option("--beta", type=Number(), default=0.0, show_default=True)
@click.option("--transpose-a", is_flag=True, help="Aᵀ instead of A")
@click.option("--transpose-b", is_flag=True, help="Bᵀ instead of B")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--kernel", help="by name; default: the fastest, by measurement")
@click.option("--blocks", type=click.Choice(["auto", "never", "always"]), default="auto", show_default=True, help=(
    "whether all workers share the product, tile by tile"
))  # fmt: skip
@click.option("--timeout", type=Number(min=0), default=3600.0, show_default=True, help="seconds")
@click.option("--json", "as_json", is_flag=True, help="the result as one JSON object")
def matmul(
    a: tuple[Path, str], b: tuple[Path, str], c: tuple[Path, str] | None, output: Path | None, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Multiply two matrices on the matmul workers of this host.

    Example: pipeline matmul a.npy weights.safetensors:layer.0 -o c.npy
    """

    async def ask() -> MatmulResult:
        with click.progressbar(length=1, label="tiles", file=sys.stderr, hidden=as_json) as bar:

            def show(tile: TileProgress) -> None:
                bar.length = tile.total
                bar.update(tile.done - bar.pos)

            async with Pipeline("matmul-cli") as app:
                result = await multiply(app, a, b, c, output=output, progress=show, **options)
            bar.length = result.tiles
            bar.update(result.tiles - bar.pos)
        return result

    result = asyncio.run(ask())
    if as_json:
        click.echo(result.model_dump_json(exclude={"product"}))
        return
    share = "" if result.peak_share is None else f" ({result.peak_share:.0%} of what the {result.device} reached)"
    tiles = "" if result.tiles == 1 else f", {result.tiles} tiles"
    click.echo(
        f"{result.dtype} {[*result.batch, result.m, result.n]} over k = {result.k}: {result.seconds:.3f} s, "
        f"{result.gflops:.1f} GFLOP/s{share}, {result.kernel} on {result.device}{tiles}"
    )
    if output is not None:
        click.echo(f"product in {output}")
