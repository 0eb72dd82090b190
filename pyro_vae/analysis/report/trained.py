"""How training went: the curves, the epoch that was kept, and the settings."""

from __future__ import annotations

from typing import Any

from pyro_vae.analysis.drawing import new_axes
from pyro_vae.analysis.history import INCHES, elbo_parts
from pyro_vae.analysis.pictures import training_curves
from pyro_vae.analysis.report.page import Section
from pyro_vae.analysis.report.subject import Subject

FIGURES = {
    "train_loss": "training loss",
    "validation_objective": "validation: the objective",
    "validation_loss": "validation: minus the ELBO",
    "validation_reconstruction": "validation: reconstruction term",
    "validation_kl": "validation: KL",
    "lr": "step size",
}


def trained(subject: Subject) -> Section:
    """The section on training."""
    section = Section("training", "How training went", "In nats per datum: losses are better lower, the ELBO higher.")
    metrics = subject.run.metrics
    section.figure(
        "Training curves",
        lambda: training_curves(subject.run, new_axes(INCHES)),
        "Minus the training loss and the validation ELBO by epoch; the dot marks the weights that were kept. A "
        "training curve that climbs while the validation curve falls is overfitting.",
    )
    if any("validation_kl" in m for m in metrics):
        section.figure(
            "The two parts of the ELBO",
            lambda: elbo_parts(subject.run),
            "What the reconstruction still costs (distortion) and what the latents carry (rate), on validation data.",
        )
    if metrics:
        best = metrics[subject.run.kept.epoch - 1]
        section.note(f"{str(subject.run.kept).capitalize()}.")
        columns = [("epoch that was kept", best), ("last epoch", metrics[-1])]
        rows = [("epoch", *(str(m["epoch"]) for _, m in columns)), ("step", *(f"{m['step']:,}" for _, m in columns))]
        rows += [
            (name, *(_number(key, m.get(key)) for _, m in columns))
            for key, name in FIGURES.items()
            if key in metrics[-1]
        ]
        rows.append(("seconds, all epochs", "", f"{sum(m['seconds'] for m in metrics):,.0f}"))
        section.table(["figure", *(name for name, _ in columns)], rows, "Final figures")
    settings = subject.run.record.get("training", {})
    if settings:
        section.table(["setting", "value"], list(settings.items()), "Settings", folded=True)
    return section


def _number(key: str, value: Any) -> str:
    if not isinstance(value, (int, float)):
        return "-"
    return f"{value:.3g}" if key == "lr" else f"{value:.2f}"
