"""Asks the workers for one product: of arrays, which travel with the job, or of files, which stay where they are."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline import Pipeline, Tensor, catalog
from pipeline.catalog import MatmulJob, MatmulResult, Operand, ProductOf, TensorFile, TileProgress
from pipeline.errors import ConfigurationError
from pipeline.settings import settings

__all__ = ["multiply"]

SUFFIXES = (".npy", ".safetensors")


async def multiply(
    app: Pipeline,
    a: Any,
    b: Any,
    c: Any = None,
    *,
    output: Path | None = None,
    progress: Callable[[TileProgress], None] | None = None,
    timeout: float = 600.0,
    **options: Any,
) -> MatmulResult:
    """alpha · op(A) · op(B) + beta · C by the matmul workers; `options` are a MatmulJob's other fields.

    a, b, c   an array (numpy or torch, sent along), a Path of a .npy or .safetensors file on the workers' host, a
              (Path, name) of one of a .safetensors file's tensors, a TensorFile, or a ProductOf
    output    where the product is to be, as a file; it appears there as a whole. Else see MatmulJob.result.
    progress  called as tiles of a big product are done

    Raises RequestFailed saying what was expected, RequestTimeout, ConfigurationError for files that are not there.

        result = await multiply(app, Path("a.npy"), Path("b.npy"), output=Path("c.npy"))
        result = await multiply(app, array, array.T, result="event"); result.product
    """
    folder = settings().matmul_folder
    with contextlib.ExitStack() as stack:
        operands = {
            name: stack.enter_context(_operand(value, folder))
            for name, value in (("a", a), ("b", b), ("c", c))
            if value is not None
        }
        if output is not None:
            _check(output)
            options["result"] = "file"
        job = MatmulJob(**operands, **options)
        async with _followed(app, progress):
            result: MatmulResult = await app.request(catalog.matmul_jobs, job, timeout=timeout)
    if output is not None:
        await asyncio.to_thread(_take, folder / result.file, output)
    return result


@contextlib.asynccontextmanager
async def _followed(app: Pipeline, progress: Callable[[TileProgress], None] | None) -> Any:
    """Tiles of whatever this process asks for: a job's id begins with its source, and is not known before."""
    if progress is None:
        yield
        return
    async with app.watch(catalog.matmul_progress) as stream:

        async def follow() -> None:
            async for message in stream:
                if message.event.job.startswith(f"{app.source}:"):
                    progress(message.event)

        following = asyncio.create_task(follow(), name="progress")
        try:
            yield
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


@contextlib.contextmanager
def _operand(value: Any, folder: Path) -> Iterator[Operand]:
    path, name = value if isinstance(value, tuple) else (value, "")
    if isinstance(path, (TensorFile, ProductOf, Tensor)):
        yield path
    elif isinstance(path, Path):
        with _within(folder, path) as file:
            yield TensorFile(file=file, name=name)
    else:
        yield Tensor(value)


@contextlib.contextmanager
def _within(folder: Path, path: Path) -> Iterator[str]:
    """A file's name in the workers' folder: its own, or for as long as this lasts that of a link to it (on another file
    system, of a copy)."""
    if path.suffix not in SUFFIXES or not path.is_file():
        raise ConfigurationError(f"{path}: expected a file that ends in {' or '.join(SUFFIXES)}")
    real, root = path.resolve(), folder.resolve()
    if real.is_relative_to(root):
        yield str(real.relative_to(root))
        return
    staged = root / "staged" / f"{secrets.token_hex(8)}{path.suffix}"
    staged.parent.mkdir(parents=True, exist_ok=True)
    try:
        try:
            os.link(real, staged)
        except OSError:
            shutil.copyfile(real, staged)
        yield str(staged.relative_to(root))
    finally:
        staged.unlink(missing_ok=True)


def _check(output: Path) -> None:
    """Raises ConfigurationError when no product can be put there: now, and not when it is computed."""
    if output.suffix not in SUFFIXES:
        raise ConfigurationError(f"{output}: a product's name ends in {' or '.join(SUFFIXES)}")
    if not (output.parent.is_dir() and os.access(output.parent, os.W_OK | os.X_OK)):
        raise ConfigurationError(f"{output}: there is no folder {str(output.parent)!r} that can be written to")


def _take(product: Path, output: Path) -> None:
    """Move a product to where it was asked for. Raises ConfigurationError when that is no place for it."""
    if product.suffix != output.suffix:
        raise ConfigurationError(f"the product is a {product.suffix} file, so it stays at {product}, not at {output}")
    scratch = output.with_name(f".{output.name}-{secrets.token_hex(4)}")
    shutil.move(product, scratch)  # perhaps to another file system
    scratch.replace(output)
