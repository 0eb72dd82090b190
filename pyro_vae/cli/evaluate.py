"""``pyro-vae evaluate``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyro_vae.cli.options import DataRoot, Device, Json, Present, ProgramFile, RunPath, Seed, Split, refuse_given

if TYPE_CHECKING:
    from torch import Tensor

METHODS = {"iw": "importance weighting", "ais": "annealing", "bdmc": "annealing, and back"}
OF_WEIGHTING = {"samples", "target_error", "precision", "noise"}  # options that belong to one method
OF_ANNEALING = {"chains", "distributions", "leapfrog", "start"}


def evaluate(
    ctx: typer.Context,
    run: RunPath,
    samples: Annotated[int, typer.Option(min=1, help="Importance samples per image, K.")] = 5000,
    target_error: Annotated[
        float | None,
        typer.Option(
            help="iw: nats; a pilot decides how many draws an image gets for about this standard error, --samples is the most.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="A random subset of so many images, by a fixed seed.", show_default=False)
    ] = None,
    split: Split = "test",
    present: Present = None,
    method: Annotated[
        str,
        typer.Option(
            help="iw (importance weighting), ais (annealed importance sampling) or bdmc (the same, with bounds from below and "
            "above on as many simulated images)."
        ),
    ] = "iw",
    chains: Annotated[int, typer.Option(min=1, help="ais, bdmc: chains per image.")] = 16,
    distributions: Annotated[int, typer.Option(min=1, help="ais, bdmc: intermediate distributions.")] = 1000,
    leapfrog: Annotated[int, typer.Option(min=1, help="ais, bdmc: leapfrog steps in each.")] = 10,
    start: Annotated[str, typer.Option(help="ais, bdmc: anneal from the prior or the guide.")] = "prior",
    precision: Annotated[
        str, typer.Option(help="iw: full, or for speed tf32 (CUDA) or bf16, with the error in nats that this makes.")
    ] = "full",
    noise: Annotated[
        str, typer.Option(help="iw: random, or sobol (quasi-Monte Carlo: a smaller error where latents are few).")
    ] = "random",
    seed: Seed = 0,
    device: Device = "auto",
    data_root: DataRoot = None,
    model: ProgramFile = None,
    json: Json = False,
    no_save: Annotated[bool, typer.Option("--no-save", help="Print alone: write nothing into the run.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """NLL of a run on test images, with its error bars and diagnostics.

    Annealing costs chains * distributions * leapfrog gradients per image: choose a --limit. If it is interrupted, the same
    command goes on where it was.
    """
    import warnings
    from functools import partial

    from pyro_vae.cli.output import deliver, saved
    from pyro_vae.cli.runs import open_run
    from pyro_vae.data.columned import thinned
    from pyro_vae.errors import UserError, nearest
    from pyro_vae.evaluation.evaluate import chosen_rows
    from pyro_vae.evaluation.evaluate import evaluate as evaluate_program
    from pyro_vae.evaluation.methods import Annealing, ImportanceSampling
    from pyro_vae.evaluation.result import UnreliableEstimateWarning
    from pyro_vae.training.distributed import is_first, join
    from pyro_vae.training.files import checksum_of, write_text
    from pyro_vae.training.progress import Progress
    from pyro_vae.training.run import WEIGHTS, evaluation_name

    rank = join().rank
    if method not in METHODS:
        raise UserError(f"unknown --method {method!r}: {nearest(method, METHODS)}")
    refuse_given(
        ctx, OF_ANNEALING if method == "iw" else OF_WEIGHTING, f"--method {method} has no use for some options"
    )
    loaded, weights = open_run(run, device, model), checksum_of(run / WEIGHTS)
    data = loaded.load_data(data_root)
    data = data if present is None else thinned(data, present, split)
    total = len(chosen_rows(len(data.stored(split)), limit))
    of_process = f"-{rank}" if rank else ""
    parts = {} if method == "iw" else {"checkpoint": "ais", "simulated_checkpoint": "bdmc"}
    checkpoints: dict[str, Any] = {
        name: Kept(run / f"evaluation-{part}{of_process}.safetensors", writes=not no_save)
        for name, part in parts.items()
    }
    with (
        Progress(total * (2 if method == "bdmc" else 1), visible=not quiet and is_first(), unit="image") as bar,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", UnreliableEstimateWarning)  # printed with the result
        how: ImportanceSampling | Annealing
        if method == "iw":
            how, note = (
                ImportanceSampling(samples, target_error, seed, precision=precision, noise=noise),
                f"K = {samples}",
            )
        else:
            how, note = Annealing(chains, distributions, leapfrog, start, seed), f"{chains} chains"  # type: ignore[arg-type]
        figures, _ = evaluate_program(
            loaded.program, data, method=how, split=split, limit=limit, simulated=method == "bdmc",
            progress=lambda n: bar.advance(n, note), **checkpoints,
        )  # fmt: skip
    figures |= {} if present is None else {"present": present}
    figures["weights_crc32"] = weights
    text = _json(figures)
    if is_first():
        where = run / evaluation_name(method, split)
        write = partial(saved, run, lambda: write_text(where, text + "\n"))
        deliver(text if json else _table(figures), (lambda: None) if no_save else write, str(where))
    for unfinished in checkpoints.values():
        unfinished.remove()


class Kept:
    """Unfinished annealing in a file of the run; one that is damaged, or of other settings, is begun again."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and the state that were last saved."""
        from pyro_vae.errors import UserError
        from pyro_vae.training.files import read_tensors

        if not self.path.is_file():
            return None
        try:
            return read_tensors(self.path)
        except UserError:
            return None

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Replace what was saved."""
        from pyro_vae.cli.output import saved
        from pyro_vae.training.files import write_tensors

        if self.writes:
            self.writes = saved(self.path.parent, lambda: write_tensors(self.path, tensors, state))

    def remove(self) -> None:
        """Nothing is unfinished any more."""
        if self.writes:
            self.path.unlink(missing_ok=True)


def _json(figures: dict[str, Any]) -> str:
    import json

    return json.dumps(figures, indent=2)


def _table(figures: dict[str, Any]) -> str:
    """The figures as lines of Markdown; NLL and ELBO with the decimals that the error of the NLL supports."""
    from pyro_vae.evaluation.result import digits, drawn_range, kl_digits, total_error

    f = figures

    def number(key: str, decimals: int = 2) -> str:
        return "-" if f[key] is None else f"{f[key]:.{decimals}f}"

    error = total_error(*(math.nan if f[key] is None else f[key] for key in ("nll_mc_se", "nll_data_se")))

    def supported(key: str) -> str:
        return "-" if f[key] is None else digits(f[key], error)

    kl = "-" if f["kl"] is None else kl_digits(f["kl"], error)
    annealed = f["method"] != "iw"
    samples = f"{f['num_samples']} chains" if annealed else f"K = {f['num_samples']}"
    if "draws_mean" in f:
        samples = f"K = {drawn_range(f['draws_mean'], f['draws_min'], f['draws_max'], f['num_samples'])}"
    if "noise" in f:
        samples += f", {f['noise']} noise"
    found = [
        ("  Monte Carlo error", f"{number('nll_mc_se', 3)} ({samples}; bias {number('nll_bias', 3)})"),
        ("  without the bias", _corrected(f)),
    ]
    if (states := f.get("states")) is not None:
        found = [("  computed", "exact" if states == 1 else f"exact, a sum over {states:,} states")]
    rows = [
        ("NLL", f"{supported('nll')} nats per image"),
        *found,
        ("  data error", f"{number('nll_data_se')} (N = {f['num_data']}, {f['split']}; Monte Carlo included)"),
        ("ELBO", f"{supported('elbo')} = reconstruction {supported('reconstruction')} - KL {kl}"),
        ("bits per dimension", number("bits_per_dim", 4)),
    ]
    if len(layers := f.get("kl_per_layer", {})) > 1:  # of one it is the KL
        rows.append(("KL per layer", " + ".join(f"{n} {kl:.2f}" for n, kl in layers.items())))
    if f["active_units"]:
        units = " + ".join("not defined" if n is None else str(n) for n in f["active_units"])
        rows.append(("active units", units))
    if states is None:
        rows.append(("ESS, median", _effective(f, 1 if annealed else 0)))
    if "target_met" in f:
        rows.insert(2, ("  target", f"standard error at most {f['target_se']:g} nats: {f['target_met']:.1%} of images"))
    if "precision" in f:
        cost = (
            f"{f['rounding_error']:+.2g} +- {f['rounding_error_sd']:.2g}"
            if f["rounding_error"] is not None
            else "unknown"
        )
        rows.append((f"error of {f['precision']}", f"{cost} nats per image, against float64 and the same draws"))
    if annealed:
        rows += [
            (
                "annealed",
                f"from the {f['start']}, {f['num_distributions']} distributions, {f['num_leapfrog']} leapfrog steps",
            ),
            ("acceptance", number("acceptance")),
        ]
    elif states is None:
        bad = "-" if f["khat_bad_fraction"] is None else f"{f['khat_bad_fraction']:.1%}"
        rows += [("Pareto k, median", f"{number('khat_median')} (bad: {bad}{_thresholds(f)})")]
        if "proof" in f:
            rows.append(("weights", _proof(f["proof"])))
    if f["method"] == "bdmc":
        rows += [
            ("simulated images", f"log p(x) between {number('bdmc_lower')} and {number('bdmc_upper')}"),
            ("  gap", f"{number('bdmc_gap', 3)} +- {number('bdmc_gap_se', 3)} (N = {f['bdmc_num_images']})"),
        ]
    rows += [
        (
            "binarization",
            f["binarization"] if f["dequantization"] == "none" else f"dequantization {f['dequantization']}",
        ),
        ("seconds", number("seconds", 1)),
    ]
    return "\n".join([*markdown(["quantity", "value"], rows), *(f"warning: {w}" for w in f["warnings"])])


def _proof(found: dict[str, Any]) -> str:
    """What was found of the weights on data that the model draws itself."""
    open_ = [q["name"] for q in found["questions"] if q["verdict"] not in ("holds", "fault")]
    words = [f"{found['verdict']} on {found['num_rows']} rows of the model's own"]
    return "; ".join([*words, *([f"not so: {', '.join(open_)}"] if open_ else [])])


def _corrected(f: dict[str, Any]) -> str:
    """The corrected NLL and where that of these images lies, all with the decimals of its Monte Carlo error and one more."""
    from pyro_vae.evaluation.result import digits

    named = [f[key] for key in ("nll_corrected", "nll_interval_low", "nll_interval_high")]
    error = f["nll_mc_se"]
    if None in named or error is None:
        return "-"
    middle, low, high = (digits(value, error / 10) for value in named)
    bad = f["khat_bad_fraction"]
    but = f"; {bad:.1%} have a bad k, and may lie lower" if bad else ""
    return f"{middle} (95 %: {low} to {high}, of these images{but})"


def _effective(f: dict[str, Any], decimals: int) -> str:
    """The median effective sample size, of as many draws as an image got."""
    if "ess_share_median" in f:
        return "-" if f["ess_share_median"] is None else f"{f['ess_share_median']:.0%} of an image's draws"
    return "-" if f["ess_median"] is None else f"{f['ess_median']:.{decimals}f} of {f['num_samples']}"


def _thresholds(f: dict[str, Any]) -> str:
    """What k is held against where images got different numbers of draws."""
    if "khat_threshold_min" not in f:
        return ""
    low, high = f["khat_threshold_min"], f["khat_threshold_max"]
    return f", above {low:.2f} to {high:.2f} by an image's draws" if low < high else f", above {low:.2f}"


def markdown(head: list[str], rows: list[Any]) -> list[str]:
    """A table as lines of Markdown, its columns aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    line = lambda cells: "| " + " | ".join(f"{c:<{w}}" for c, w in zip(cells, widths, strict=True)) + " |"  # noqa: E731
    return [line(head), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *(line(row) for row in rows)]
