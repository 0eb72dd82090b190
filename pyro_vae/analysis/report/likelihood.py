"""The likelihood and its evidence: evaluations that the run keeps, and one of some test images made for the page."""

from __future__ import annotations

import math
import warnings
from typing import Any

from pyro_vae.analysis.curve import bound_against_samples
from pyro_vae.analysis.drawing import new_axes
from pyro_vae.analysis.evidence import weight_diagnostics
from pyro_vae.analysis.report.page import Section
from pyro_vae.analysis.report.subject import Subject
from pyro_vae.errors import UserError
from pyro_vae.evaluation.curve import BoundCurve, bound_curve
from pyro_vae.evaluation.evaluate import evaluate
from pyro_vae.evaluation.result import (
    LogLikelihood,
    UnreliableEstimateWarning,
    digits,
    drawn_range,
    kl_digits,
    total_error,
)
from pyro_vae.training.files import checksum_of, damaged, parse_json, read_text
from pyro_vae.training.run import WEIGHTS, evaluation_name

SAVED = {
    "iw": "pyro-vae evaluate",
    "ais": "pyro-vae evaluate --method ais",
    "bdmc": "pyro-vae evaluate --method bdmc",
}
HERE = "this page"
INCHES = (7.2, 3.8)  # of the curve, with a legend beside it
ROWS = (
    ("NLL (nats per image)", "nll"),
    ("  Monte Carlo error", "nll_mc_se"),
    ("  data error", "nll_data_se"),
    ("  bias of the bound", "nll_bias"),
    ("NLL without the bias", "nll_corrected"),
    ("  95 % interval, lower end", "nll_interval_low"),
    ("  95 % interval, upper end", "nll_interval_high"),
    ("ELBO", "elbo"),
    ("  reconstruction", "reconstruction"),
    ("  KL", "kl"),
    ("bits per dimension", "bits_per_dim"),
    ("images", "num_data"),
    ("samples or chains per image", "num_samples"),
    ("ESS, median", "ess_median"),
    ("Pareto k, median", "khat_median"),
    ("images with bad k", "khat_bad_fraction"),
    ("simulated images: lower bound", "bdmc_lower"),
    ("simulated images: upper bound", "bdmc_upper"),
    ("  gap", "bdmc_gap"),
)
TO_ERROR = ("nll", "elbo", "reconstruction", "kl")  # printed with the decimals that the NLL's error supports
TO_TENTH = ("nll_corrected", "nll_interval_low", "nll_interval_high")  # with one decimal more
SHARES = ("khat_bad_fraction",)
LEAD = (
    "Importance-weighted log p(x) in nats per image. The Monte Carlo error is over redrawn samples; the data "
    "error is over images and samples drawn anew, and holds it. The interval is for the mean of these images, around the "
    "estimate without the bias of the bound. Where Pareto k is bad, the number is a bound, and neither error nor interval tells "
    "how loose."
)


def estimated(subject: Subject) -> tuple[dict[str, Any], LogLikelihood]:
    """The figures of ``evaluate`` on the test images of the page, and the per-image result."""
    if subject.data is None:
        raise UserError(subject.missing)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)  # printed with the result
        return evaluate(
            subject.program, subject.data, num_samples=subject.num_samples, limit=subject.limit, seed=subject.seed
        )


def saved(subject: Subject) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The evaluations of test images in the run's directory, by the command that made them, and what is wrong with others."""
    found: dict[str, dict[str, Any]] = {}
    refused: list[str] = []
    folder = subject.run.path
    if folder is None:
        return found, refused
    for method, command in SAVED.items():
        path = folder / evaluation_name(method)
        if not path.is_file():
            continue
        try:
            figures = parse_json(read_text(path), path)
            if not isinstance(figures, dict) or _finite(figures.get("nll")) is None:
                raise damaged(path, "it holds no NLL")
            if figures.get("weights_crc32") == checksum_of(folder / WEIGHTS):
                found[command] = figures
            else:
                refused.append(f"{path.name} is of other weights than these, and is not shown: run {command} again.")
        except UserError as error:
            refused.append(str(error))
    return found, refused


def likelihood(
    subject: Subject, evaluations: dict[str, dict[str, Any]], result: LogLikelihood | None, refused: str | None
) -> Section:
    """The section on the likelihood.

    Args:
        subject: the run.
        evaluations: figures by where they come from, the most thorough first.
        result: per image, of the page's own evaluation.
        refused: why there is none, or why one that is saved is not shown.
    """
    section = Section("likelihood", "The likelihood and its evidence", LEAD)
    if refused is not None:
        section.note(refused if result is not None else f"No evaluation was made for this page. {refused}")
    if evaluations:
        rows = [
            [title, *(_cell(figures, key) for figures in evaluations.values())]
            for title, key in ROWS
            if any(_finite(figures.get(key)) is not None for figures in evaluations.values())
        ]
        section.table(["figure", *evaluations], rows)
    for source, figures in evaluations.items():
        found = figures.get("warnings")
        for text in found if isinstance(found, list) else []:
            section.warning(f"{source}: {text}")
    if result is None:
        return section
    if result.proof is not None:
        head, *rows = result.proof.table()
        caption = f"The weights of the guide: {result.proof.verdict}, asked on {result.proof.num_rows} data that the model drew"
        section.table(head, rows, caption)
    weights = "Pareto k and effective sample size"
    if result.states is not None:
        section.note(
            f"{weights}: left out; log p(x) is exact, "
            + (
                f"a sum over {result.states:,} states of the latents. The bound by draws, below, may stay under it."
                if result.states > 1
                else "as the program has no latents."
            )
        )
    else:
        section.figure(
            weights,
            lambda: weight_diagnostics(result),
            f"Of {len(result)} images, K = {_draws(result.summary())}. Right of the broken line the weights of an image "
            "likely have no variance: its estimate is too low by an unknown amount.",
        )
    section.figure(
        "The bound against K",
        lambda: bound_against_samples(_curve(subject), new_axes(INCHES)),
        "The importance-weighted bound by the number of samples, with a 95 % band over redrawn samples. It begins "
        "at the ELBO; where it still rises at the right end, it is not log p(x).",
    )
    return section


def _curve(subject: Subject) -> BoundCurve:
    rows, num_samples = subject.test, max(2, subject.num_samples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)  # printed with the result
        return bound_curve(subject.program, rows.x, rows.y, num_samples=num_samples, seed=subject.seed)


def headline(figures: dict[str, Any]) -> tuple[str, str]:
    """The NLL with its error, and how it was estimated."""
    errors = [_finite(figures.get(key)) for key in ("nll_mc_se", "nll_data_se")]
    error = total_error(*(math.nan if e is None else e for e in errors))
    images, count = figures.get("num_data", "?"), _draws(figures)
    spread = f" ± {digits(error, error)}" if math.isfinite(error) else ""
    return _cell(figures, "nll") + spread, f"nats per image; {images} images, K = {count}"


def _cell(figures: dict[str, Any], key: str) -> str:
    value = _finite(figures.get(key))
    if value is None:
        return "-"
    if key in TO_ERROR:
        errors = [_finite(figures.get(k)) for k in ("nll_mc_se", "nll_data_se")]
        total = total_error(*(math.nan if e is None else e for e in errors))
        return kl_digits(value, total) if key == "kl" else digits(value, total)
    if key in TO_TENTH:
        error = _finite(figures.get("nll_mc_se"))
        return digits(value, math.nan if error is None else error / 10)
    if key in SHARES:
        return f"{value:.1%}"
    if key == "num_samples":
        return _draws(figures)
    if key == "ess_median":
        share = _finite(figures.get("ess_share_median"))
        return f"{value:.3g} of {_draws(figures)}" if share is None else f"{share:.0%} of an image's draws"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _draws(figures: dict[str, Any]) -> str:
    """Draws of an image: one number, or where images got different ones, their range."""
    allowed = _finite(figures.get("num_samples"))
    if allowed is None:
        return "?"
    mean, least, most = (_finite(figures.get(key)) for key in ("draws_mean", "draws_min", "draws_max"))
    if mean is None or least is None or most is None:
        return f"{allowed:,.0f}"
    return drawn_range(mean, least, most, allowed)


def _finite(value: Any) -> float | None:
    """A number of a file that anybody may have written, or None."""
    return value if type(value) in (int, float) and math.isfinite(value) else None
