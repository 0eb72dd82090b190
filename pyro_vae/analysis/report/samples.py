"""What the model makes: samples with their nearest training data, and reconstructions with what the posterior leaves open."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_vae.analysis import pictures
from pyro_vae.analysis.nearest import nearest_training
from pyro_vae.analysis.report.page import Section
from pyro_vae.analysis.report.subject import Subject
from pyro_vae.analysis.uncertainty import reconstruction_uncertainty
from pyro_vae.programs.latents import sample

NEAREST_AMONG = 10_000  # training data
PAIRS = {True: 20, False: 5}  # images, vectors
RECONSTRUCTED, UNCERTAIN = 20, 8
LONG = 200  # points that are reconstructed, for two-dimensional data


def sampled(subject: Subject) -> Section:
    """The section on samples."""
    section = Section("samples", "Samples")
    given = " Classes in equal shares, in order." if subject.conditional else ""
    section.figure(
        "Samples",
        lambda: pictures.samples(subject.program, seed=subject.seed, y=subject.classes()),
        "z is drawn from the prior; what is shown is the mean of p(x | z)." + given,
    )
    section.figure(
        "Samples beside the nearest training data",
        lambda: _nearest(subject),
        f"Each sample and the nearest of up to {NEAREST_AMONG:,} training data, by Euclidean distance: pairs that "
        "look the same are copies, not samples.",
    )
    return section


def reconstructed(subject: Subject) -> Section:
    """The section on reconstructions."""
    section = Section("reconstructions", "Reconstructions")
    points = subject.event_shape == (2,)

    def draw() -> Axes | Figure:
        rows = subject.shown.first(LONG if points else RECONSTRUCTED if pictures.is_image(subject.event_shape) else 4)
        return pictures.reconstructions(subject.program, rows.x, rows.y)

    def uncertain() -> Axes | Figure:
        rows = subject.shown.first(50 if points else UNCERTAIN)
        return reconstruction_uncertainty(subject.program, rows.x, rows.y, seed=subject.seed)

    section.figure("Reconstructions", draw, "Test data and the mean of p(x | z) at the guide's mean of z.")
    section.figure(
        "Reconstructions with their uncertainty",
        uncertain,
        "The mean of p(x | z) averaged over 100 draws of q(z | x), and its standard deviation over them: what "
        "this datum leaves open.",
    )
    return section


def _nearest(subject: Subject) -> Axes | Figure:
    images = pictures.is_image(subject.event_shape)
    num = 300 if subject.event_shape == (2,) else PAIRS[images]
    train = subject.rows("train", NEAREST_AMONG)
    made = sample(
        subject.program, num, subject.classes(num), mean=True, event_shape=subject.event_shape, seed=subject.seed
    )
    return nearest_training(made, train.x)
