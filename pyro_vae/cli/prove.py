"""``pyro-vae prove``."""

from __future__ import annotations

from typing import Annotated

import typer

from pyro_vae.cli.options import DataRoot, Device, Json, ProgramFile, RunPath, Seed, Split


def prove(
    run: RunPath,
    rows: Annotated[int, typer.Option(min=1, help="Rows drawn from the model; more find smaller faults.")] = 256,
    samples: Annotated[int, typer.Option(min=2, help="Draws of the guide for each.")] = 100,
    limit: Annotated[
        int | None, typer.Option(min=1, help="A random subset of so many data, by a fixed seed.", show_default=False)
    ] = None,
    split: Split = "test",
    seed: Seed = 0,
    device: Device = "auto",
    data_root: DataRoot = None,
    model: ProgramFile = None,
    json: Json = False,
) -> None:
    """Whether the importance weights of a run are what they are taken for, asked on data that its model draws itself.

    One table: what must hold, what was found, the verdict, and what would have been found. A fault makes the status 1.
    """
    from pyro_vae.cli.output import deliver
    from pyro_vae.cli.runs import open_run
    from pyro_vae.evaluation.evaluate import chosen_rows, rows_for
    from pyro_vae.evaluation.proof import prove as prove_program
    from pyro_vae.tables import markdown

    loaded = open_run(run, device, model)
    data = loaded.load_data(data_root)
    chosen = chosen_rows(len(data.stored(split)), limit)
    x, y = rows_for(loaded.program, data, split, chosen)
    proof = prove_program(loaded.program, x, y, num_rows=rows, num_samples=samples, seed=seed)
    if json:
        import json as plain

        text = plain.dumps(proof.summary() | {"split": split}, indent=2)
    else:
        head, *table = proof.table()
        lines = [
            f"weights of the guide: {proof.verdict}",
            markdown(head, table),
            *(f"fault: {f}" for f in proof.faults),
        ]
        text = "\n".join(lines)
    deliver(text, lambda: None, "")
    if proof.verdict == "fault":
        raise typer.Exit(1)
