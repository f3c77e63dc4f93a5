"""`qgraph quantize`: a model of mlx-lm, packed as well as can be for its bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .commands import app


@app.command()
def quantize(
    model: Annotated[str, typer.Option(help="A folder, or a repository of the hub, of floats.")],
    data: Annotated[
        Path,
        typer.Option(
            exists=True, dir_okay=False, help="A text file to fit on; its last piece measures."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write, which mlx-lm loads.")],
    bits: Annotated[
        float | None, typer.Option(help="Of a number in the mean, scales and biases included.")
    ] = None,
    size: Annotated[
        int | None, typer.Option("--bytes", help="Of all packed weights, instead of --bits.")
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Of scales, gptq, sensitivity and awq, with commas between.")
    ] = "scales,gptq,sensitivity",
    length: Annotated[int, typer.Option(min=2, help="Tokens of a piece of text.")] = 512,
    pieces: Annotated[int, typer.Option(min=1, help="How many pieces to fit on, at most.")] = 8,
) -> None:
    """Pack a model of mlx-lm with the best bits and numbers for its bytes.

    Writes the folder, in it `quantization.md` with a row for each weight, and `quantization.svg`
    with quality by bytes. A run that was broken off goes on where it was.
    """
    if (bits is None) == (size is None):
        raise typer.BadParameter("give one of --bits and --bytes")
    from ..lm.quality import draw, report
    from ..lm.quantize import quantize as run

    packed = run(
        model, out, data=data, bits=bits, bytes=size, methods=tuple(methods.split(",")),
        length=length, pieces=pieces,
    )  # fmt: skip
    page = packed.folder / "quantization.md"
    page.write_text(report(packed))
    typer.echo(f"perplexity {packed.before:.3f} before, {packed.after:.3f} after; see {page}")
    if draw(packed, packed.folder / "quantization.svg") is None:
        typer.echo("no picture: it takes matplotlib, pip install 'qgraph[bench]'")
