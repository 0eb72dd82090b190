"""``pyro-vae evaluate``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pyro_vae.cli.options import DataRoot, Device, Json, ProgramFile, RunPath, Seed, Split


def evaluate(
    run: RunPath,
    samples: Annotated[int, typer.Option(min=1, help="Importance samples per image, K.")] = 5000,
    limit: Annotated[
        int | None, typer.Option(min=1, help="A random subset of so many images, by a fixed seed.", show_default=False)
    ] = None,
    split: Split = "test",
    seed: Seed = 0,
    device: Device = "auto",
    data_root: DataRoot = None,
    model: ProgramFile = None,
    json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Importance-weighted NLL of a run, with its error bars and diagnostics."""
    import warnings

    from pyro_vae.cli.runs import open_run
    from pyro_vae.evaluation.evaluate import chosen_rows
    from pyro_vae.evaluation.evaluate import evaluate as evaluate_program
    from pyro_vae.evaluation.result import UnreliableEstimateWarning
    from pyro_vae.training.files import write_text
    from pyro_vae.training.progress import Progress

    loaded = open_run(run, device, model)
    data = loaded.load_data(data_root)
    total = len(chosen_rows(len(data.stored(split)), limit))
    with Progress(total, visible=not quiet, unit="image") as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)  # printed with the result
        figures, _ = evaluate_program(
            loaded.program, data, split=split, num_samples=samples, limit=limit, seed=seed,
            progress=lambda n: bar.advance(n, f"K = {samples}"),
        )  # fmt: skip
    text = _json(figures)
    write_text(run / "evaluation.json", text + "\n")
    print(text if json else _table(figures))


def _json(figures: dict[str, Any]) -> str:
    import json

    return json.dumps(figures, indent=2)


def _table(figures: dict[str, Any]) -> str:
    """The figures as lines of Markdown."""
    f = figures

    def number(key: str, digits: int = 2) -> str:
        return "-" if f[key] is None else f"{f[key]:.{digits}f}"

    rows = [
        ("NLL", f"{number('nll')} nats per image"),
        ("  Monte Carlo error", f"{number('nll_mc_se', 3)} (K = {f['num_samples']}; bias {number('nll_bias', 3)})"),
        ("  data error", f"{number('nll_data_se')} (N = {f['num_data']}, {f['split']})"),
        ("ELBO", f"{number('elbo')} = reconstruction {number('reconstruction')} - KL {number('kl')}"),
        ("bits per dimension", number("bits_per_dim", 4)),
        ("active units", " + ".join(str(n) for n in f["active_units"])),
        ("ESS, median", f"{number('ess_median', 0)} of {f['num_samples']}"),
        (
            "Pareto k, median",
            f"{number('khat_median')} (bad: {'-' if f['khat_bad_fraction'] is None else format(f['khat_bad_fraction'], '.1%')})",
        ),
        (
            "binarization",
            f["binarization"] if f["dequantization"] == "none" else f"dequantization {f['dequantization']}",
        ),
        ("seconds", number("seconds", 1)),
    ]
    width, right = max(len(a) for a, _ in rows), max(len(b) for _, b in rows)
    lines = [f"| {'quantity':<{width}} | {'value':<{right}} |", f"|{'-' * (width + 2)}|{'-' * (right + 2)}|"]
    lines += [f"| {a:<{width}} | {b:<{right}} |" for a, b in rows]
    return "\n".join(lines + [f"warning: {w}" for w in f["warnings"]])
