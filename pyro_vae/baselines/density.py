"""A density for a decoder that was trained without one: a prior, a guide of its own, and log p(x).

The decoder stays as it is; what is trained is the guide, by a fit like any other, and the scale of a normal likelihood with it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.mixture import GaussianMixture as Mixture
from torch import Tensor, nn

from pyro_vae.baselines.base import How, Progress
from pyro_vae.data import Data
from pyro_vae.errors import UserError, unsaid, warn
from pyro_vae.evaluation.degenerate import DegenerateFitWarning
from pyro_vae.evaluation.evaluate import chosen_rows, evaluate
from pyro_vae.evaluation.methods import Annealing, ImportanceSampling
from pyro_vae.evaluation.result import UnreliableEstimateWarning
from pyro_vae.networks.heads import positive_inverse
from pyro_vae.priors.base import Prior
from pyro_vae.priors.gaussian_mixture import MIN_SCALE, GaussianMixture
from pyro_vae.seeding import derive_seed, generator
from pyro_vae.training.fit import fit
from pyro_vae.training.run import SPEC

ANNEALED, CHAINS, DISTRIBUTIONS = 100, 8, 500  # images, and for each
BLOCK = 1000
FEWEST_STEPS, MOST_ROUNDS, RATE = 500, 20, 5e-3  # of a prior that is fitted by gradients


@torch.no_grad()
def codes(program: Any, data: Data, split: str = "train") -> Tensor:
    """Means of q(z | x) of all rows of a split ``(N, latent_dim)``, prepared once."""
    x = data.observed(split)
    return torch.cat([program.q(part).mean for part in x.split(BLOCK)])


def fit_prior(prior: Prior, z: Tensor, epochs: int, seed: int) -> float:
    """Fit p(z) to codes ``(N, latent_dim)`` by maximum likelihood, in place; the mean log p(z) in nats.

    A mixture of normals by EM; any other prior with parameters by Adam, in rounds of so many passes (500 steps at least) until
    one raises the mean by less than 0.02 nats, and a last one whose rate falls to zero. A warning tells a fit that is below
    independent normals of the codes' own means and scales.
    """
    if isinstance(prior, GaussianMixture):
        _by_em(prior, z, seed)
    elif any(p.requires_grad for p in prior.parameters()):
        _by_ascent(prior, z, max(FEWEST_STEPS, math.ceil(len(z) / 128) * epochs), generator("codes", seed))
        normals = -float((z.std(0).log() + 0.5 * math.log(2 * math.pi * math.e)).sum())
        if (found := mean_log_prob(prior, z)) < normals - 0.5:
            warn(
                f"the prior {type(prior).__name__} was fitted to codes with a mean log p(z) of {found:.2f} nats, where "
                f"independent normals have {normals:.2f}: it has not arrived; give more prior_epochs, or a mixture of normals",
                UserWarning,
            )
    return mean_log_prob(prior, z)


@torch.no_grad()
def mean_log_prob(prior: Prior, z: Tensor) -> float:
    """E log p(z) of codes, in nats."""
    return float(prior(z).log_prob(z).mean())


def _by_ascent(prior: Prior, z: Tensor, steps: int, source: torch.Generator) -> None:
    optimizer = torch.optim.Adam([p for p in prior.parameters() if p.requires_grad])

    def ascend(rate: Callable[[float], float]) -> None:
        for step in range(steps):
            rows = torch.randint(len(z), (128,), generator=source)
            optimizer.param_groups[0]["lr"] = rate(step / steps)
            optimizer.zero_grad()
            (-prior(z[rows]).log_prob(z[rows]).mean()).backward()
            optimizer.step()

    best = -math.inf
    for _ in range(MOST_ROUNDS):
        ascend(lambda share: RATE)
        if not (now := mean_log_prob(prior, z)) > best + 0.02:
            break
        best = now
    ascend(lambda share: RATE * (1 - share))


@torch.no_grad()
def _by_em(prior: GaussianMixture, z: Tensor, seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # EM that has not converged in so many rounds is an answer too
        found = Mixture(
            len(prior.logits), covariance_type="diag", reg_covar=MIN_SCALE**2, max_iter=100,
            random_state=derive_seed("mixture of codes", seed) % 2**32,
        ).fit(z.double().numpy())  # fmt: skip
    prior.logits.copy_(torch.from_numpy(found.weights_).log())
    prior.loc.copy_(torch.from_numpy(found.means_))
    scales = torch.from_numpy(found.covariances_).sqrt().clamp(min=1.001 * MIN_SCALE)
    prior.raw_scale.copy_(
        torch.tensor([positive_inverse(s, MIN_SCALE) for s in scales.flatten().tolist()]).view_as(scales)
    )


def require_mean(program: Any, event_shape: tuple[int, ...], kind: str) -> None:
    """:class:`UserError` for a posterior whose distribution has no mean or spread to train on."""
    try:
        with torch.no_grad():
            q = program.q(torch.zeros(1, *event_shape))
            q.mean, q.stddev  # noqa: B018
    except NotImplementedError:
        raise UserError(
            f"{kind} trains on the guide's mean, and a {type(program.posterior).__name__} has none: choose diagonal-normal"
        ) from None


def fit_guide(program: Any, data: Data, epochs: int, path: Path | None, seed: int, visible: bool) -> float:
    """Train q(z | x), and the scale of a normal likelihood, with everything else as it is; goes on with what ``path`` holds.

    Returns:
        Minutes.
    """
    free = {*program.encoder.parameters(), *program.posterior.parameters()}
    if isinstance(scale := getattr(program.likelihood, "raw_scale", None), nn.Parameter):
        free.add(scale)
    for parameter in program.parameters():
        parameter.requires_grad_(parameter in free)
    resume = path is not None and (path / SPEC).is_file()
    with unsaid(DegenerateFitWarning):  # a decoder that makes little of z is what is to be found out
        run = fit(
            program,
            data,
            epochs=epochs,
            lr=1e-3,
            standardize="off",
            out=path,
            resume=resume,
            seed=seed,
            progress=visible,
        )
    return sum(line["seconds"] for line in run.metrics) / 60.0


def figures_of(program: Any, data: Data, how: How, progress: Progress) -> dict[str, Any]:
    """NLL by importance weighting of all images, and by annealing of some of them, as a paired difference."""
    few = min(ANNEALED, how.limit or ANNEALED)
    annealing = Annealing(
        num_chains=how.chains or CHAINS, num_distributions=how.distributions or DISTRIBUTIONS, seed=how.seed
    )
    rows = how.rows(data)
    with unsaid(UnreliableEstimateWarning):
        found, weighted = evaluate(
            program, data, method=ImportanceSampling(how.samples, seed=how.seed), split=how.split, limit=how.limit,
            progress=lambda n: progress(n / len(rows) / 2),
        )  # fmt: skip
        annealed, chains = evaluate(
            program, data, method=annealing, split=how.split, limit=few, progress=lambda n: progress(n / few / 2)
        )
    same = torch.isin(rows, chosen_rows(len(data.stored(how.split)), few))
    difference = chains.log_likelihood - weighted.log_likelihood[same]
    return {
        **{k: found[k] for k in ("nll", "nll_mc_se", "nll_data_se", "num_data", "bits_per_dim", "elbo", "khat_median",
                                 "khat_bad_fraction", "active_units", "warnings")},
        "computed": f"IW at K = {how.samples:,}; AIS of {len(difference)} images {-float(difference.mean()):+.2f}",
        "ais_nll": annealed["nll"], "ais_minus_iw_nll": -float(difference.mean()), "ais_num_data": len(difference),
        "ais_minus_iw_nll_se": float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else None,
    }  # fmt: skip


def annealed_figures(program: Any, data: Data, how: How, progress: Progress) -> dict[str, Any]:
    """NLL by annealing of some images, with the gap of bounds from both sides on as many that the model draws."""
    few = min(ANNEALED, how.limit or ANNEALED)
    annealing = Annealing(
        num_chains=how.chains or CHAINS, num_distributions=how.distributions or DISTRIBUTIONS, seed=how.seed
    )
    with unsaid(UnreliableEstimateWarning):
        found, result = evaluate(
            program, data, method=annealing, split=how.split, limit=few, simulated=True,
            progress=lambda n: progress(n / few / 2),
        )  # fmt: skip
    kept = ("nll", "nll_mc_se", "nll_data_se", "num_data", "bits_per_dim", "acceptance", "bdmc_lower", "bdmc_upper",
            "bdmc_gap", "bdmc_gap_se", "warnings")  # fmt: skip
    told = f"AIS ({result.num_samples} chains, {annealing.num_distributions:,} distributions; BDMC gap {found['bdmc_gap']:.2f})"
    return {**{k: found[k] for k in kept}, "computed": told}
