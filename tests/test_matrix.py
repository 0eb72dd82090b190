"""Every prior with every posterior, and every likelihood with every kind of data: it works, or it is refused with the reason.

What works trains 20 steps on digits with a falling loss, finite gradients for every parameter by name, and a finite
importance-weighted NLL. The matrix stands in docs/matrix.md; ``PYRO_VAE_WRITE_DOCS=1 pytest tests/test_matrix.py -m slow`` writes
it anew.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch

import pyro_vae as pv
from pyro_vae import registry
from pyro_vae.errors import UserError
from pyro_vae.evaluation.result import UnreliableEstimateWarning
from pyro_vae.objectives.elbo import ELBO
from pyro_vae.programs.contract import admit
from pyro_vae.programs.values import check_observed
from pyro_vae.seeding import seeded

DOCS = Path(__file__).resolve().parent.parent / "docs" / "matrix.md"
SMALL = {"latent_dim": 3, "decoder.hidden": [16], "encoder.hidden": [16]}
STEPS, BATCH = 20, 64
PRIORS, POSTERIORS = registry.names("priors"), registry.names("posteriors")
LIKELIHOODS = registry.names("likelihoods")

# A pair that is quick and stands for its kind runs in the fast suite too.
FAST = {("standard-normal", "diagonal-normal"), ("gaussian-mixture", "diagonal-normal")}

KINDS = {
    "binary": lambda: pv.load_data("digits", binarization="dynamic"),
    "lattice": lambda: pv.load_data("digits", binarization="none"),
    "dequantized": lambda: pv.load_data("digits", binarization="none", dequantization="uniform"),
    "real": lambda: standardised(),
    "counts": lambda: counts(),
}


def standardised():
    x = pv.load_data("digits", binarization="none").observed("train")
    return (x - x.mean(0)) / (x.std(0) + 0.1)


def counts():
    return (pv.load_data("digits", binarization="none").observed("train") * 16).round()


def train_a_little(program, data):
    """Twenty steps; everything that a pair that works must show."""
    x = data if isinstance(data, torch.Tensor) else data.observed("train")
    traces = admit(program, x[:4])
    check_observed(traces, x)
    loss = ELBO(num_particles=20)
    batch = x[:BATCH]

    def measure():
        with seeded(0), torch.no_grad():
            return float(loss(program, batch)[0])

    before = measure()
    optimizer = torch.optim.Adam(program.parameters(), lr=3e-3)
    with seeded(1):
        for _ in range(STEPS):
            _, surrogate = loss(program, batch)
            optimizer.zero_grad()
            surrogate.backward()
            for name, p in program.named_parameters():
                if p.requires_grad:
                    assert p.grad is not None, f"{name} receives no gradient"
                    assert torch.isfinite(p.grad).all(), f"the gradient of {name} is not finite"
            optimizer.step()
    assert measure() < before, "the loss did not fall"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)
        result = pv.log_likelihood(program, x[:10], num_samples=50)
    assert torch.isfinite(result.log_likelihood).all(), "the importance-weighted NLL is not finite"


def outcome(build, data):
    """``yes``, or the reason why not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train_a_little(build(), data)
    except UserError as error:
        return str(error)
    return "yes"


# The reasons stand in the docs, where their sense is for a reader to judge.
_found: dict[tuple[str, str], str] = {}


def pairs(rows, columns, fast):
    return [
        pytest.param(row, column, marks=[] if (row, column) in fast else [pytest.mark.slow], id=f"{row}-{column}")
        for row in rows
        for column in columns
    ]


@pytest.mark.parametrize(("prior", "posterior"), pairs(PRIORS, POSTERIORS, FAST))
def test_prior_and_posterior(prior, posterior):
    data = pv.load_data("digits")
    few = {"components": 10} if "components" in registry.schema("priors", prior).model_fields else {}
    declared = {"name": prior, **few}
    _found[prior, posterior] = outcome(
        lambda: pv.build("mlp", "diagonal", data, prior=declared, posterior=posterior, **SMALL), data
    )


@pytest.mark.parametrize(
    ("likelihood", "kind"), pairs(LIKELIHOODS, KINDS, {("bernoulli", "binary"), ("normal", "real")})
)
def test_likelihood_and_data(likelihood, kind):
    data = KINDS[kind]()
    options = {"levels": 17} if "levels" in registry.schema("likelihoods", likelihood).model_fields else {}
    declared = {"name": likelihood, **options}
    _found[likelihood, kind] = outcome(lambda: pv.build("mlp", "diagonal", data, likelihood=declared, **SMALL), data)


def table(rows, columns):
    """Markdown with a mark per pair, and the reasons below."""
    reasons: list[str] = []
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = []
        for column in columns:
            reason = _found[row, column]
            if reason == "yes":
                cells.append("yes")
                continue
            if reason not in reasons:
                reasons.append(reason)
            cells.append(f"no ({reasons.index(reason) + 1})")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))])


@pytest.mark.slow
def test_the_matrix_stands_in_the_docs():
    wanted = [(p, q) for p in PRIORS for q in POSTERIORS] + [(a, k) for a in LIKELIHOODS for k in KINDS]
    missing = [pair for pair in wanted if pair not in _found]
    if missing:
        pytest.skip("needs the whole of this file in one run")
    text = (
        "# What goes with what\n\nPrinted by `tests/test_matrix.py`, which trains every pair that is not refused.\n\n"
        f"## Priors and posteriors\n\n{table(PRIORS, POSTERIORS)}\n\n"
        "## Likelihoods and data\n\nEight by eight digits: binarized, on their 17 levels, dequantized to (0, 1), standardised "
        f"to real numbers, and as counts.\n\n{table(LIKELIHOODS, list(KINDS))}\n"
    )
    if os.environ.get("PYRO_VAE_WRITE_DOCS"):
        DOCS.write_text(text)
    assert DOCS.read_text() == text, "docs/matrix.md is stale: run this file with PYRO_VAE_WRITE_DOCS=1"
