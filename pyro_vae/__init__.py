"""Variational autoencoders as Pyro programs.

    import pyro_vae as pv

    data = pv.load_data("mnist")
    vae = pv.build("mixture", "diagonal", data)
    run = pv.fit(vae, data, epochs=50)
    print(pv.log_likelihood(run.program, data.observed("test"), num_samples=5000))

Importing this package changes no global state, and imports torch only when something is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "load_data": "pyro_vae.data",
    "Data": "pyro_vae.data",
    "Record": "pyro_vae.data.record",
    "build": "pyro_vae.spec",
    "Spec": "pyro_vae.spec",
    "fit": "pyro_vae.training.fit",
    "MonteCarloEM": "pyro_vae.training.monte_carlo_em",
    "load": "pyro_vae.training.run",
    "Run": "pyro_vae.training.run",
    "log_likelihood": "pyro_vae.evaluation.importance",
    "score": "pyro_vae.evaluation.score",
    "LogLikelihood": "pyro_vae.evaluation.result",
    "annealed_log_likelihood": "pyro_vae.evaluation.ais",
    "bidirectional": "pyro_vae.evaluation.bdmc",
    "bound_curve": "pyro_vae.evaluation.curve",
    "compare": "pyro_vae.evaluation.compare",
    "prove": "pyro_vae.evaluation.proof",
    "Proof": "pyro_vae.evaluation.questions",
    "inference_gaps": "pyro_vae.evaluation.gaps",
    "evaluate": "pyro_vae.evaluation.evaluate",
    "ImportanceSampling": "pyro_vae.evaluation.methods",
    "Annealing": "pyro_vae.evaluation.methods",
    "adopt": "pyro_vae.programs.adopted",
    "encode": "pyro_vae.programs.latents",
    "decode": "pyro_vae.programs.latents",
    "sample": "pyro_vae.programs.latents",
    "reconstruct": "pyro_vae.programs.latents",
    "sample_columns": "pyro_vae.programs.drawn",
    "export": "pyro_vae.evaluation.export",
    "latent_information": "pyro_vae.evaluation.information",
    "LatentInformation": "pyro_vae.evaluation.information",
    "posterior": "pyro_vae.analysis.posterior",
    "impute": "pyro_vae.analysis.imputation",
    "traversals": "pyro_vae.analysis.traversal",
    "embedding": "pyro_vae.analysis.embedding",
    "aggregate_posterior": "pyro_vae.analysis.aggregate",
    "unit_rates": "pyro_vae.analysis.aggregate",
    "reconstruction_uncertainty": "pyro_vae.analysis.uncertainty",
    "nearest_training": "pyro_vae.analysis.nearest",
    "report": "pyro_vae.analysis.report",
    "compare_report": "pyro_vae.analysis.report",
    "Program": "pyro_vae.programs.trace",
    "UserError": "pyro_vae.errors",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from pyro_vae.analysis.aggregate import aggregate_posterior, unit_rates
    from pyro_vae.analysis.embedding import embedding
    from pyro_vae.analysis.imputation import impute
    from pyro_vae.analysis.nearest import nearest_training
    from pyro_vae.analysis.posterior import posterior
    from pyro_vae.analysis.report import compare_report, report
    from pyro_vae.analysis.traversal import traversals
    from pyro_vae.analysis.uncertainty import reconstruction_uncertainty
    from pyro_vae.data import Data, load_data
    from pyro_vae.data.record import Record
    from pyro_vae.errors import UserError
    from pyro_vae.evaluation.ais import annealed_log_likelihood
    from pyro_vae.evaluation.bdmc import bidirectional
    from pyro_vae.evaluation.compare import compare
    from pyro_vae.evaluation.curve import bound_curve
    from pyro_vae.evaluation.evaluate import evaluate
    from pyro_vae.evaluation.export import export
    from pyro_vae.evaluation.gaps import inference_gaps
    from pyro_vae.evaluation.importance import log_likelihood
    from pyro_vae.evaluation.information import LatentInformation, latent_information
    from pyro_vae.evaluation.methods import Annealing, ImportanceSampling
    from pyro_vae.evaluation.proof import prove
    from pyro_vae.evaluation.questions import Proof
    from pyro_vae.evaluation.result import LogLikelihood
    from pyro_vae.evaluation.score import score
    from pyro_vae.programs.adopted import adopt
    from pyro_vae.programs.drawn import sample_columns
    from pyro_vae.programs.latents import decode, encode, reconstruct, sample
    from pyro_vae.programs.trace import Program
    from pyro_vae.spec import Spec, build
    from pyro_vae.training.fit import fit
    from pyro_vae.training.monte_carlo_em import MonteCarloEM
    from pyro_vae.training.run import Run, load


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pyro_vae' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
