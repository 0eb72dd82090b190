"""The latent space: what it carries, which units carry it, what it looks like."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_vae.analysis import pictures
from pyro_vae.analysis.aggregate import aggregate_posterior, unit_rates
from pyro_vae.analysis.embedding import embedding
from pyro_vae.analysis.manifold import prior_sites
from pyro_vae.analysis.report.page import Section
from pyro_vae.analysis.report.subject import Subject
from pyro_vae.analysis.traversal import traversals
from pyro_vae.evaluation.evaluate import ACTIVE_IMAGES
from pyro_vae.evaluation.information import LatentInformation, latent_information

EMBEDDED = 2000
PAIRS, STEPS = 6, 8
UNITS = 8
MANIFOLD, CURVES = 15, 4  # pictures per axis, vectors per axis
LEAD = (
    "All in nats per datum. A unit is active if the guide's mean of it varies by more than 0.01 over the data "
    "(Burda et al. 2016); of one that is not, the guide says the same whatever x is."
)


def latent(subject: Subject) -> Section:
    """The section on the latent space."""
    section = Section("latent", "Latent space", LEAD)
    found: list[LatentInformation] = []

    def measure() -> None:
        train = subject.rows("train", ACTIVE_IMAGES)
        found.append(latent_information(subject.program, train.x, train.y, seed=subject.seed))

    section.attempt("Rate, distortion and active units", measure)
    for information in found:
        _figures(section, information)
    _maps(section, subject)
    _ways(section, subject)
    return section


def _figures(section: Section, found: LatentInformation) -> None:
    rows = [
        ("rate, KL(q(z | x) || p(z))", f"{found.rate:.2f} ± {found.rate_se:.2g}"),
        ("distortion, -E log p(x | z)", f"{found.distortion:.2f} ± {found.distortion_se:.2g}"),
        ("mutual information I(x; z)", _bounds(_information(found))),
        ("KL of the aggregate posterior to the prior", _bounds(_marginal(found))),
        ("KL of each layer", ", ".join(f"{name} {kl:.2f}" for name, kl in found.kl_per_layer.items())),
        ("active units", f"{found.num_active} of {len(found.names)}"),
        ("units that are not active", ", ".join(found.collapsed) or "none"),
    ]
    section.table(["figure", f"over {found.num_data} training images"], rows)
    for text in found.warnings:
        section.warning(text)
    section.figure(
        "The rate of each unit",
        lambda: unit_rates(found),
        "Each unit's KL between the marginals of guide and prior: they add up to the rate where both are products "
        "over units. Where they have no closed form, the variance of the guide's mean stands in.",
    )


def _maps(section: Section, subject: Subject) -> None:
    def embed() -> Axes | Figure:
        rows = subject.rows("test", EMBEDDED)
        names = None if subject.data is None else subject.data.label_names
        return embedding(subject.program, rows.x, rows.y, labels=rows.labels, label_names=names, seed=subject.seed)

    def aggregate() -> Axes | Figure:
        rows = subject.rows("test", EMBEDDED)
        return aggregate_posterior(subject.program, rows.x, rows.y, seed=subject.seed)

    section.figure(
        "Embedding",
        embed,
        "The guide's means of test data: two units as they are, more units in principal components.",
    )
    section.figure(
        "Aggregate posterior and prior",
        aggregate,
        "A draw of q(z | x) for each test datum, and as many of the prior. Grey without blue is where samples "
        "come from and no datum is; blue without grey is where data are and no sample comes from.",
    )


def _ways(section: Section, subject: Subject) -> None:
    def move() -> Axes | Figure:
        rows = subject.shown.first(500)
        return traversals(subject.program, rows.x, rows.y, num_units=UNITS, seed=subject.seed)

    def interpolate() -> Axes | Figure:
        pairs = min(PAIRS, len(subject.test.x) // 2)
        rows = subject.shown.first(2 * pairs)
        y = None if rows.y is None else rows.y[:pairs]
        return pictures.interpolations(subject.program, rows.x, STEPS, y)

    section.figure(
        "Traversals",
        move,
        "From one test datum, the units that vary most go through the prior's mean ± 2 standard deviations, one "
        "at a time.",
    )
    section.figure("Interpolations", interpolate, "From one test datum to another, straight in latent space.")
    section.attempt("Manifold", lambda: _manifold(section, subject))


def _manifold(section: Section, subject: Subject) -> None:
    """The manifold, where the latent, or the top layer, has two units."""
    y = subject.classes(1)
    sites = list(prior_sites(subject.program, y, subject.event_shape).values())
    if not sites or sites[0].event_shape.numel() != 2:
        return
    drawn_small = pictures.is_image(subject.event_shape) or subject.event_shape == (2,)
    num = MANIFOLD if drawn_small else CURVES
    section.figure(
        "Manifold",
        lambda: pictures.manifold(subject.program, num, y),
        "The mean of p(x | z) at quantiles of the prior: every picture stands for the same share of its mass."
        + ("" if y is None else f" Given {y[0].tolist()}."),
    )


def _information(found: LatentInformation) -> list[tuple[float, float]]:
    ends = [
        (found.information_lower, found.information_lower_se),
        (found.information_upper, found.information_upper_se),
    ]
    return [(bound, se) for bound, se in ends if bound is not None and se is not None]


def _marginal(found: LatentInformation) -> list[tuple[float, float]]:
    if found.marginal_kl is None or found.marginal_kl_se is None:
        return []
    return list(zip(found.marginal_kl, found.marginal_kl_se, strict=True))


def _bounds(ends: list[tuple[float, float]]) -> str:
    if not ends:
        return "not known: the guide cannot score a z it did not draw, or is conditional"
    return " to ".join(f"{bound:.2f} ± {se:.2g}" for bound, se in ends)
