"""Posterior checks in a quick setting: does the model make data like these, and is the guide calibrated?"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from pyro_vae.analysis.calibration import Calibration, sbc
from pyro_vae.analysis.diagnostics import QUANTITIES, Quantity, predictive_check
from pyro_vae.analysis.evidence import predictive_intervals
from pyro_vae.analysis.posterior import posterior
from pyro_vae.analysis.report.page import Section
from pyro_vae.analysis.report.subject import Subject
from pyro_vae.errors import UserError

CHECKED, DRAWS, CHAINS = 100, 25, 2
ELEMENTS = 2**22  # replicated numbers at most
SIMULATIONS, RANKED = 200, 63
PANELS = 8  # quantities that are drawn, the least uniform first
LEAD = (
    "Quick settings. The first check asks of the model whether it makes data like the test data; the second asks "
    "of the guide, on data simulated from the model, whether its draws are draws of the posterior."
)


def checks(subject: Subject) -> Section:
    """The section on posterior checks."""
    section = Section("checks", "Posterior checks", LEAD)
    section.attempt("Posterior predictive check", lambda: _predictive(section, subject))
    section.attempt("Simulation-based calibration", lambda: _calibration(section, subject))
    return section


def _predictive(section: Section, subject: Subject) -> None:
    if subject.records:
        raise UserError(
            "the rows are records, and no test quantity is one of columns with gaps: ask of pv.posterior by column"
        )
    numel = math.prod(subject.event_shape)
    rows = subject.shown.first(max(4, min(CHECKED, ELEMENTS // (DRAWS * CHAINS * numel))))
    tree = posterior(
        subject.program, rows.x, rows.y, num_samples=DRAWS, num_chains=CHAINS, prior=False, seed=subject.seed
    )
    found = predictive_check(tree, _quantities(subject))
    outside = ((found["p_value"] < 0.025) | (found["p_value"] > 0.975)).mean("image")
    worst = np.sort(np.argsort(-outside.values, kind="stable")[:PANELS])
    said = f" (of {len(outside)} columns those that fit least)" if len(worst) < len(outside) else ""
    found = found.isel(quantity=worst)
    table = []
    for name in found["quantity"].values:
        part = found.sel(quantity=name)
        p = part["p_value"].values
        table.append(
            [
                str(name), f"{part['observed'].values.mean():.4g}", f"{part['mean'].values.mean():.4g}",
                f"{np.median(p):.2f}", f"{np.mean((p < 0.025) | (p > 0.975)):.0%}",
            ]
        )  # fmt: skip
    section.table(
        ["test quantity T", "data, mean", "replicated, mean", "p-value, median", "p outside 0.025 to 0.975"],
        table,
        f"Posterior predictive check on {len(rows.x)} test images, {DRAWS * CHAINS} replications each{said}",
    )
    section.figure(
        "Test quantities, observed and replicated",
        lambda: predictive_intervals(found),
        "Each datum's T(x) against mean ± 2 standard deviations of its replications; on the line the two agree. "
        "The model has seen the datum, so p-values are conservative: few lie outside.",
    )


def _quantities(subject: Subject) -> dict[str, Quantity]:
    """What is asked of the data, in their own words: each column of a table; level, spread and roughness of anything else."""
    if subject.columns:
        return {name: lambda x, i=i: x[..., i] for i, name in enumerate(subject.columns)}  # type: ignore[misc]
    # differences and spreads need two elements along an axis
    small = min(subject.event_shape[-2:]) < 2
    found = {n: q for n, q in QUANTITIES.items() if not small or n == "mean_ink"}
    return found if subject.kind == "image" else {"mean" if n == "mean_ink" else n: q for n, q in found.items()}


def _calibration(section: Section, subject: Subject) -> None:
    found = sbc(
        subject.program, SIMULATIONS, RANKED, subject.classes(SIMULATIONS), seed=subject.seed,
        event_shape=subject.event_shape,
    )  # fmt: skip
    verdict = (
        "calibration is not rejected" if found.passes() else "calibration is rejected: the guide is not the posterior"
    )
    section.note(f"Simulation-based calibration: {found}: {verdict} at the level 0.01.")
    section.figure(
        "Calibration of the guide",
        lambda: _least_uniform(found),
        "ECDF of the ranks minus the uniform one, with the band that an exact guide stays in with probability "
        f"0.99 (the {min(PANELS, found.p_value.size)} least uniform of {found.p_value.size} quantities). A slope "
        "through the middle from below to above is a guide that is too wide, the other way round one that is too "
        "narrow; a bow is a shift.",
    )


def _least_uniform(found: Calibration) -> Figure:
    order = np.argsort(found.p_value.values, kind="stable")[:PANELS]
    return replace(
        found,
        ranks=found.ranks.isel(quantity=order),
        p_value=found.p_value.isel(quantity=order),
        chi2_p_value=found.chi2_p_value.isel(quantity=order),
    ).plot_ecdf()
