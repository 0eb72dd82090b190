"""``pyro-vae export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyro_vae.cli.options import Device, ProgramFile, RunPath, expand


def export(
    run: RunPath,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to write into (default: RUN/export).", show_default=False, callback=expand),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="encoder, decoder, posterior (mean and scale) or density, once for each; the first two where it is not given.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="density: draws of the guide for each row, K.")] = 100,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write ONNX files too (needs onnxscript).")] = False,
    device: Device = "auto",
    model: ProgramFile = None,
) -> None:
    """Write the encoder and the decoder as torch.export programs, which need neither Pyro nor this library.

    torch.export.load(FILE).module() of the encoder is called with a batch x and gives the latents as a dict by site; that of
    the decoder is called with such a dict and gives the mean of p(x | z); the density is called with a batch and its noise, and
    gives log p(x) and the ELBO.
    """
    import torch

    from pyro_vae.cli.runs import open_run
    from pyro_vae.evaluation.export import PARTS, ROWS
    from pyro_vae.evaluation.export import export as export_program
    from pyro_vae.programs.labels import needs_y

    opened = open_run(run, device, model)
    y = None
    if needs_y(opened.program):
        from pyro_vae.evaluation.evaluate import labels_of

        y = labels_of(opened.load_data(None), "train", torch.arange(ROWS))
    folder = out if out is not None else run / "export"
    for part in export_program(opened.program, folder, parts=only or PARTS, y=y, num_samples=samples, onnx=onnx):
        for suffix in (".pt2", ".onnx") if onnx else (".pt2",):
            print(folder / f"{part}{suffix}")
