"""The report on one run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyro_vae.analysis import describe
from pyro_vae.analysis.drawing import drawn, speaking
from pyro_vae.analysis.report import page
from pyro_vae.analysis.report.checks import checks
from pyro_vae.analysis.report.declared import declared
from pyro_vae.analysis.report.latent import latent
from pyro_vae.analysis.report.likelihood import HERE, estimated, headline, likelihood, saved
from pyro_vae.analysis.report.page import Section
from pyro_vae.analysis.report.samples import reconstructed, sampled
from pyro_vae.analysis.report.subject import Subject
from pyro_vae.analysis.report.surprising import surprising
from pyro_vae.analysis.report.trained import trained
from pyro_vae.data import Data
from pyro_vae.data.columned import for_program
from pyro_vae.data.content import Changed
from pyro_vae.data.given import as_data
from pyro_vae.errors import UserError
from pyro_vae.evaluation.result import LogLikelihood
from pyro_vae.signatures import checked
from pyro_vae.training.run import Run

NAME = "report.html"
LIMIT, NUM_SAMPLES = 200, 500
PARTS = 8  # sections, of which progress is told


@checked
@drawn
def report(
    run: Run,
    path: str | os.PathLike[str] | None = None,
    *,
    data: Any = None,
    limit: int = LIMIT,
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
    progress: Callable[[str], None] = lambda name: None,
) -> Path:
    """Write one self-contained HTML page about a run: declaration, training, likelihood, samples, latents, checks, anomalies.

    What the program or its data cannot have is left out, with a line that says why. Evaluations in the run's directory stand
    beside the page's own.

    Args:
        run: a run.
        path: a name that ends in ``.html``; ``report.html`` in the run's directory where None.
        data: the data of a run that was loaded and was not trained on a named data set or file; else they are at hand.
        limit: test images that are evaluated, at most.
        num_samples: importance samples per image, K.
        seed: of everything drawn.
        progress: called with the title of each of eight sections before it is made.

    Returns:
        The path.

    Raises:
        UserError: a place that cannot be written to.
    """
    if not isinstance(run, Run):
        raise UserError(f"expected a run, what fit and load return, got {type(run).__name__}")
    data = None if data is None else for_program(run.program, as_data(data))
    if path is None:
        if run.path is None:
            raise UserError("the run has no directory: say where the report goes, report(run, path)")
        path = run.path / NAME
    if limit < 2 or num_samples < 2:
        raise UserError(f"expected a limit and num_samples of at least 2, got {limit} and {num_samples}")
    target = page.destination(path)
    if data is not None:
        _require_its_preparation(run, data)
    data, missing = (data, "") if data is not None else _data(run)
    subject = Subject(run, data, missing, limit, num_samples, seed)
    with speaking(series=subject.kind == "series", columns=subject.columns if subject.kind == "table" else ()):
        sections = _sections(subject, progress)
    for section in sections if subject.kind != "image" else ():
        section.speak("row")
    title = f"{subject.name}: a {'model' if data is None else 'model of ' + data.name}"
    return page.write(target, page.render(title, _subtitle(subject), sections))


def _require_its_preparation(run: Run, data: Data) -> None:
    """Data that were prepared otherwise than those that the run was trained on give figures of something else."""
    recorded = run.record.get("data", {})
    for name in ("binarization", "dequantization"):
        trained, given = recorded.get(name), getattr(data, name)
        if trained is not None and trained != given:
            raise UserError(
                f"the run was trained on data with {name} {trained!r}, and {data.name} is given with {given!r}: give "
                f"data.with_({name}={trained!r}), or leave data out"
            )


def _data(run: Run) -> tuple[Data | None, str]:
    try:
        return run.load_data(), ""
    except Changed:
        raise  # a page over other data would say what is not so
    except UserError as error:
        return None, f"{error}."


def _sections(subject: Subject, progress: Callable[[str], None]) -> list[Section]:
    progress("likelihood")
    result: LogLikelihood | None = None
    evaluations, refused = saved(subject)
    try:
        evaluations[HERE], result = estimated(subject)
    except UserError as error:
        refused.append(str(error))
    found = [_summary(subject, evaluations), likelihood(subject, evaluations, result, " ".join(refused) or None)]
    makers: list[tuple[str, Callable[[], Section]]] = [
        ("declaration", lambda: declared(subject)),
        ("training", lambda: trained(subject)),
        ("samples", lambda: sampled(subject)),
        ("reconstructions", lambda: reconstructed(subject)),
        ("latent space", lambda: latent(subject)),
        ("posterior checks", lambda: checks(subject)),
        ("anomalies", lambda: surprising(subject, result)),
    ]
    for name, make in makers:
        progress(name)
        found.append(make())
    # read in this order: summary, declaration, training, likelihood, the rest
    return [found[0], found[2], found[3], found[1], *found[4:]]


def _summary(subject: Subject, evaluations: dict[str, dict[str, Any]]) -> Section:
    section = Section("summary", "Summary")
    facts = []
    if evaluations:
        source, figures = next(iter(evaluations.items()))
        value, word = headline(figures)
        facts.append(("test NLL", value, f"{word} ({source})"))
        bad = figures.get("khat_bad_fraction")
        if type(bad) in (int, float):
            facts.append(("bad Pareto k", f"{bad:.0%}", "of the images"))
        units = figures.get("active_units")
        if isinstance(units, list):
            facts.append(
                ("active units", " + ".join("not defined" if n is None else str(n) for n in units), "per latent site")
            )
    trained_numbers = describe.total(describe.parameters(subject.program))
    facts.append(("parameters", f"{trained_numbers:,}", "trained"))
    metrics = subject.run.metrics
    if metrics:
        facts.append(("training", f"{len(metrics):,} epochs", f"{sum(m['seconds'] for m in metrics):,.0f} s"))
    section.facts(facts)
    return section


def _subtitle(subject: Subject) -> str:
    kind = type(subject.program).__name__
    shape = " x ".join(str(n) for n in subject.event_shape)
    noun = "images" if subject.kind == "image" else "rows"
    return (
        f"{kind} on data of shape {shape}. Figures of this page: up to {subject.limit} test {noun}, K = "
        f"{subject.num_samples}, seed {subject.seed}."
    )
