"""How often the stated 95 % Monte Carlo interval of an importance-weighted log-likelihood holds the exact value.

    python benchmarks/coverage.py [--redraws 400] [--samples 1000] [--images 500] [--components 4]

Probabilistic PCA on the digits: the decoder is scikit-learn's solution times a random rotation, so that log p(x) is known
(``PCA.score_samples``) and no diagonal guide is exact; the guide is trained alone. The noise is redrawn many times over fixed
images. The interval is that of the bias-corrected mean: mean(log p - bias) +- 1.96 nll_mc_se. To be between 92.5 % and 97.5 %.
The table goes to benchmarks/results/coverage.md, the figures to coverage.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
import warnings
from pathlib import Path

import torch
from sklearn.decomposition import PCA

import pyro_vae as pv
from pyro_vae.evaluation.evaluate import chosen_rows
from pyro_vae.evaluation.result import UnreliableEstimateWarning
from pyro_vae.networks.heads import positive_inverse
from pyro_vae.objectives.elbo import AnalyticELBO
from pyro_vae.seeding import generator, seeded

RESULTS = Path(__file__).parent / "results"


def program(x: torch.Tensor, components: int, seed: int) -> tuple[torch.nn.Module, PCA]:
    """The VAE whose decoder is the solution of PCA times a rotation, and the PCA."""
    pca = PCA(components, svd_solver="full").fit(x.flatten(1).double().numpy())
    noise = float(pca.noise_variance_)
    normal = torch.randn(components, components, generator=generator(seed), dtype=torch.float64)
    rotation, _ = torch.linalg.qr(normal)
    spread = torch.from_numpy(pca.explained_variance_ - noise).sqrt()
    vae = pv.build("ppca", "linear", tuple(x.shape[1:]), latent_dim=components, seed=seed)
    with torch.no_grad():
        vae.likelihood.head.map.weight.copy_((torch.from_numpy(pca.components_).T * spread) @ rotation)
        vae.likelihood.head.map.bias.copy_(torch.from_numpy(pca.mean_))
        vae.likelihood.raw_scale.fill_(positive_inverse(math.sqrt(noise), vae.likelihood.min_scale))
    return vae, pca


def train_guide(vae: torch.nn.Module, x: torch.Tensor, steps: int, seed: int) -> None:
    """Adam on the ELBO of all images, on the guide's parameters alone."""
    parameters = [*vae.encoder.parameters(), *vae.posterior.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    objective = AnalyticELBO()
    with seeded(seed):
        for step in range(steps):
            _, loss = objective(vae, x, step=step)
            for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = grad
            optimizer.step()
            schedule.step()


def main() -> None:
    """Train the guide, redraw, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redraws", type=int, default=400)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--components", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore", UnreliableEstimateWarning)

    data = pv.load_data("digits", binarization="none")
    train = data.observed("train")
    vae, pca = program(train, args.components, args.seed)
    train_guide(vae, train, args.steps, args.seed)
    x = train[chosen_rows(len(train), args.images)]
    # score_samples has a rounded noise variance of its own: the parameters that the program holds are what it is judged by
    weight, bias = vae.likelihood.head.map.weight.detach().double(), vae.likelihood.head.map.bias.detach().double()
    scale = torch.nn.functional.softplus(vae.likelihood.raw_scale.detach().double()) + vae.likelihood.min_scale
    covariance = weight @ weight.T + scale**2 * torch.eye(len(bias), dtype=torch.float64)
    score = torch.distributions.MultivariateNormal(bias, covariance).log_prob(x.flatten(1).double())
    exact = float(score.mean())
    sklearn = float(pca.score_samples(x.flatten(1).double().numpy()).mean())

    start, z, khat, elbo = time.perf_counter(), [], [], []
    plain, stated = [], []
    for redraw in range(args.redraws):
        result = pv.log_likelihood(vae, x, num_samples=args.samples, seed=args.seed + 1 + redraw, compile="off")
        corrected = float((result.log_likelihood - result.bias).mean())
        z.append((corrected - exact) / result.nll_mc_se)
        plain.append(corrected - exact)
        stated.append(result.nll_mc_se)
        khat.append(float(result.khat.median()))
        elbo.append(float(result.elbo.mean()))
    seconds = time.perf_counter() - start
    errors = torch.tensor(plain, dtype=torch.float64)
    covered = sum(abs(v) < 1.959964 for v in z) / len(z)
    figures = {
        "coverage": covered,
        "coverage_se": math.sqrt(covered * (1 - covered) / len(z)),
        "mean_z": sum(z) / len(z),
        "exact": exact,
        "sklearn": sklearn,
        "elbo": sum(elbo) / len(elbo),
        "bias_left": float(errors.mean()),
        "spread_of_errors": float(errors.std()),
        "stated_error": sum(stated) / len(stated),
        "khat_median": sum(khat) / len(khat),
        "seconds": round(seconds, 1),
        **vars(args),
    }
    table = "\n".join(
        [
            f"Probabilistic PCA with {args.components} components on {args.images} digits, K = {args.samples}, noise redrawn "
            f"{args.redraws} times.",
            "",
            "| coverage of the 95 % interval | exact log p(x) | ELBO | spread of the estimates | stated error | mean error |"
            " median k |",
            "|---|---|---|---|---|---|---|",
            f"| {covered:.1%} +- {figures['coverage_se']:.1%} | {exact:.4f} | {figures['elbo']:.4f} | "
            f"{figures['spread_of_errors']:.5f} | {figures['stated_error']:.5f} | {figures['bias_left']:.5f} | "
            f"{figures['khat_median']:.2f} |",
            "",
            f"scikit-learn's own value: {sklearn:.4f}. {seconds:.0f} s on {os.cpu_count()} CPU cores ({platform.machine()}), "
            f"PyTorch {torch.__version__}, Python {platform.python_version()}.",
        ]
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "coverage.json").write_text(json.dumps(figures, indent=2) + "\n")
    (RESULTS / "coverage.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
