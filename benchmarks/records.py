"""Records on real data: few labels, halves of images, holes in tables.

    python benchmarks/records.py labels --data digits     # error of M2 with 100 labels, 5 draws, and of a linear probe
    python benchmarks/records.py labels --m1              # of M1 + M2: on the latents of a VAE that knows no labels
    python benchmarks/records.py halves --data digits     # log p of each subset of left half, right half and label
    python benchmarks/records.py tables                   # 30 % holes: error against mean, nearest neighbours, iterative imputer
    python benchmarks/records.py condition --data digits  # p(x | y) against p(x), paired

``--data mnist`` takes static binarization by threshold at 1/2 of the data set of that name, its last 10,000 rows held back.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn import datasets
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.evaluation.result import UnreliableEstimateWarning


def binary(name: str, root: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images of zeros and ones with their labels, to train on and held back."""
    data = pv.load_data(name, root=root)
    parts = []
    for split in ("train", "test"):
        x = data.stored(split)[:].float() / (data.levels - 1)
        parts += [(x > 0.5).float(), data.labels[split]]
    return tuple(parts)  # type: ignore[return-value]


def table(rows: list[list[Any]], names: list[str]) -> None:
    """Print a table of Markdown."""
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for row in rows:
        print("| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row) + " |")


def first_latents(x: Tensor, test: Tensor, given: argparse.Namespace, seed: int) -> tuple[Tensor, Tensor]:
    """M1: the means of the active latents of a VAE that knows no labels, of images to train on and held back, in units of one.

    (A draw for each image, which the paper has anew in every step, is noise that a hundred labels are learned by heart with.)
    """
    vae = pv.build("mlp", "diagonal", x[:8], latent_dim=50, seed=seed)
    pv.fit(vae, x, epochs=given.epochs, batch_size=100, seed=seed)
    means, others = pv.encode(vae, x), pv.encode(vae, test)
    active = means.var(0) > 0.01  # type: ignore[union-attr]
    spread = means[:, active].std(0)  # type: ignore[index]
    return means[:, active] / spread, others[:, active] / spread  # type: ignore[index]


def labels(given: argparse.Namespace) -> None:
    """Error on held-back images with few labels, as many of each class: of M2, or of M2 on the latents of M1."""
    images, y, held, truth = binary(given.data, given.data_root)
    rows = []
    for seed in range(given.seeds):
        began = time.perf_counter()
        x, test = first_latents(images, held, given, seed) if given.m1 else (images, held)
        random = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(x), generator=random)
        chosen = torch.cat([order[y[order] == k][: given.labels // 10] for k in range(10)])
        there = torch.zeros(len(x), dtype=torch.bool)
        there[chosen] = True
        probe = LogisticRegression(max_iter=2000).fit(images[chosen].flatten(1), y[chosen])
        of_probe = 1 - probe.score(held.flatten(1), truth)
        # labelled rows are a few of many: each is there as often as makes them a fifth
        again = chosen.repeat(max(1, len(x) // (4 * len(chosen))))
        rows_of = torch.cat([torch.arange(len(x)), again])
        record = pv.Record({"x": x[rows_of], "label": y[rows_of]}, {"label": there[rows_of]})
        how = {"likelihood": "normal"} if given.m1 else {}
        hidden = f"mlp:hidden={given.hidden}"
        program = pv.build(
            "semi-supervised",
            "diagonal",
            x[:8],
            latent_dim=given.latent_dim,
            seed=seed,
            encoder=hidden,
            decoder=hidden,
            **how,
        )
        pv.fit(
            program,
            record,
            epochs=given.epochs,
            batch_size=100,
            objective=f"elbo:label_weight={given.alpha}",
            seed=seed,
        )
        minutes = (time.perf_counter() - began) / 60
        with torch.no_grad():
            features = program.features(test).flatten(1)
            quick = float((program.classify(features).argmax(1) != truth).double().mean())  # type: ignore[operator]
        few = test[:500], truth[:500]
        some = pv.Record({"x": few[0], "label": few[1]}, {"label": torch.zeros(len(few[0]), dtype=torch.bool)})
        found = pv.impute(program, some, num_samples=50, num_draws=1).probability["label"]
        rows.append([seed, of_probe, quick, float((found.argmax(1) != few[1]).double().mean()), minutes])
    means = np.array(rows)[:, 1:].astype(float)
    rows.append(["mean", *means.mean(0).tolist()])
    rows.append(["sd", *means.std(0, ddof=1).tolist()] if len(means) > 1 else ["sd", *[math.nan] * 4])
    table(
        rows,
        ["labels drawn with seed", "logistic regression", "q(label given x)", "p(label given x), 500 rows", "minutes"],
    )


class Halves(nn.Module):
    """z -> left half, right half, label; the guide reads what is present, and draws the label where it is missing."""

    def __init__(self, size: int, latent_dim: int) -> None:
        super().__init__()
        self.size, self.latent_dim = size, latent_dim
        self.decoder = nn.Sequential(nn.Linear(latent_dim, 300), nn.SiLU(), nn.Linear(300, 2 * size + 10))
        self.encoder = nn.Sequential(nn.Linear(2 * size + 13, 300), nn.SiLU(), nn.Linear(300, 2 * latent_dim))

    def model(self, x: pv.Record) -> None:
        """p(z) p(left | z) p(right | z) p(label | z)."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latent_dim), 1.0).to_event(1))
            left, right, label = self.decoder(z).split([self.size, self.size, 10], -1)
            pyro.sample("left", dist.Bernoulli(logits=left).to_event(1), obs=x["left"])
            pyro.sample("right", dist.Bernoulli(logits=right).to_event(1), obs=x["right"])
            pyro.sample("label", dist.Categorical(logits=label), obs=x["label"])

    def guide(self, x: pv.Record) -> None:
        """q(z | what is present)."""
        names = ("left", "right", "label")
        there = torch.stack([x.present[n] for n in names], 1).float()
        one_hot = nn.functional.one_hot(x["label"], 10) * there[:, 2:]
        seen = torch.cat([2 * x["left"] - there[:, :1], 2 * x["right"] - there[:, 1:2], one_hot, there], 1)
        loc, raw = self.encoder(seen).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw) + 1e-3).to_event(1))


def in_halves(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The columns of images and labels."""
    left, right = x.chunk(2, -1)
    return {"left": left.flatten(1), "right": right.flatten(1), "label": y}


def halves(given: argparse.Namespace) -> None:
    """log p of each subset of three columns, and log p(right | left) as a ratio and by posterior draws."""
    x, y, test, truth = binary(given.data, given.data_root)
    random, columns = torch.Generator().manual_seed(0), in_halves(x, y)
    # each row with a subset of its columns, so that the guide learns all of them
    there = torch.rand(len(x), 3, generator=random) < 0.65
    there[~there.any(1), 0] = True
    present = dict(zip(columns, there.unbind(1), strict=True))
    torch.manual_seed(0)
    program = Halves(columns["left"].shape[1], given.latent_dim)
    pv.fit(program, pv.Record(columns, present), epochs=given.epochs, batch_size=100)
    whole, rows = pv.Record(in_halves(test[: given.rows], truth[: given.rows])), []
    for size in (1, 2, 3):
        for names in itertools.combinations(columns, size):
            found = pv.log_likelihood(program, whole, of=names, num_samples=given.samples)
            rows.append([", ".join(names), -found.nll, found.nll_mc_se, float(found.khat.median())])
    table(rows, ["columns", "log p", "Monte Carlo error", "median k"])
    ratio = pv.log_likelihood(program, whole, of="right", given="left", num_samples=given.samples)
    print(f"log p(right | left): {-ratio.nll:.3f} +- {ratio.nll_mc_se:.3f} as a ratio ({ratio.error}); ", end="")  # type: ignore[attr-defined]
    # Independently: the mean of p(right | z) over draws of p(z | left), by importance resampling with other draws. Of few draws
    # the log of a mean with so heavy a tail comes out too low, by as much as the right half says of z that the left does not.
    for times in (2, 20, 200):
        other, error = by_draws(program, whole, times * given.samples)
        z = float((ratio.log_likelihood - ratio.bias - other).mean()) / math.hypot(ratio.nll_mc_se, error)
        print(
            f"{float(other.mean()):.3f} +- {error:.3f} by {times * given.samples:,} draws of z given left, z = {z:.2f}; ",
            end="",
        )
    print()
    if given.latent_dim == 2:
        exact = by_quadrature(program, whole)
        z = float((ratio.log_likelihood - ratio.bias - exact).mean()) / ratio.nll_mc_se
        low = float((exact - other).quantile(0.5)), float((exact - other).max())
        print(f"{float(exact.mean()):.3f} by quadrature: the ratio's z = {z:.2f}; ", end="")
        print(f"draws are {low[0]:.3f} too low in the median row, {low[1]:.1f} in the worst")


@torch.no_grad()
def by_quadrature(program: Halves, record: pv.Record) -> Tensor:
    """log p(right | left) ``(N,)`` of two latents, by sums over a grid."""
    grid = torch.linspace(-5.5, 5.5, 1100)
    of_left, of_both = torch.full((2, len(record)), -math.inf, dtype=torch.float64)
    for first in grid:
        z = torch.stack([first.expand(len(grid)), grid], 1)
        halves = zip(("left", "right"), program.decoder(z).split([program.size, program.size, 10], -1), strict=False)
        left, right = (record[n] @ a.T - nn.functional.softplus(a).sum(1) for n, a in halves)
        left = left + dist.Normal(0.0, 1.0).log_prob(z).sum(1)
        of_left = torch.logaddexp(of_left, left.double().logsumexp(1))
        of_both = torch.logaddexp(of_both, (left + right).double().logsumexp(1))
    return of_both - of_left


def by_draws(program: Halves, record: pv.Record, samples: int) -> tuple[Tensor, float]:
    """log of the weighted mean of p(right | z) over draws z ~ q(z | left), and the error of the mean over rows."""
    there = torch.ones(len(record), dtype=torch.bool)
    seen = pv.Record.of({n: record[n] for n in record}, {n: there if n == "left" else ~there for n in record})
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        left, one_hot = seen["left"], torch.zeros(len(seen), 10)
        inputs = torch.cat(
            [2 * left - 1, torch.zeros_like(left), one_hot, torch.tensor([1.0, 0, 0]).expand(len(seen), 3)], 1
        )
        # the guide's view of a missing half is the same as in training: 2 * 0 - 0
        loc, raw = program.encoder(inputs).chunk(2, -1)
        q = dist.Normal(loc, nn.functional.softplus(raw) + 1e-3).to_event(1)
        parts = []
        for _ in range(samples // 100):
            z = q.sample((100,))
            a, b, _ = program.decoder(z).split([program.size, program.size, 10], -1)
            of_left = dist.Bernoulli(logits=a).log_prob(left).sum(-1)
            of_right = dist.Bernoulli(logits=b).log_prob(record["right"]).sum(-1)
            weight = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + of_left - q.log_prob(z)
            parts.append(torch.stack([weight, of_right]))
        weight, of_right = torch.cat(parts, 1).double()
    share = weight.softmax(0)
    value = (share * of_right.exp()).sum(0)
    error = (share.square() * (of_right.exp() - value).square()).sum(0).sqrt() / value
    return value.log(), float(error.square().sum().sqrt()) / len(record)


class Table(nn.Module):
    """Standardised numbers with holes: z -> x, each number normal with a scale of its own."""

    def __init__(self, width: int, latent_dim: int = 4) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.decoder = nn.Sequential(nn.Linear(latent_dim, 32), nn.Tanh(), nn.Linear(32, width))
        self.encoder = nn.Sequential(nn.Linear(2 * width, 64), nn.Tanh(), nn.Linear(64, 2 * latent_dim))
        self.raw = nn.Parameter(torch.zeros(width))

    def model(self, x: pv.Record) -> None:
        """p(z) p(x | z)."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latent_dim), 1.0).to_event(1))
            scale = nn.functional.softplus(self.raw) + 0.05
            pyro.sample("x", dist.Normal(self.decoder(z), scale).to_event(1), obs=x["x"])

    def guide(self, x: pv.Record) -> None:
        """q(z | what is present)."""
        loc, raw = self.encoder(torch.cat([x["x"], x.present["x"].to(x["x"])], 1)).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw) + 1e-3).to_event(1))


def tables(given: argparse.Namespace) -> None:
    """Root mean square error of what was taken out, in standard deviations, and how many truths the 90 % intervals hold."""
    rows = []
    for name in ("wine", "breast_cancer", "diabetes"):
        whole = getattr(datasets, f"load_{name}")().data
        errors = []
        for seed in range(given.seeds):
            holes = np.random.default_rng(seed).uniform(size=whole.shape) < 0.3
            seen = np.where(holes, np.nan, whole)
            units = np.nanmean(seen, 0), np.nanstd(seen, 0)
            seen, truth = (seen - units[0]) / units[1], (whole - units[0]) / units[1]
            record = pv.Record({"x": torch.from_numpy(seen).float()}, nan_is_missing=True)
            torch.manual_seed(seed)
            program = Table(whole.shape[1])
            pv.fit(program, record, epochs=given.epochs, batch_size=32, lr=3e-3, seed=seed)
            found = pv.impute(program, record, num_samples=500, num_draws=200)
            ends = found.interval("x", 0.9).numpy()
            inside = ((ends[..., 0] <= truth) & (truth <= ends[..., 1]))[holes].mean()
            filled = [found.mean["x"].numpy()]
            for imputer in (SimpleImputer(), KNNImputer(), IterativeImputer(max_iter=20, random_state=seed)):
                filled.append(imputer.fit_transform(seen))
            errors.append([float(np.sqrt(np.square(f - truth)[holes].mean())) for f in filled] + [float(inside)])
        mean, sd = np.mean(errors, 0), np.std(errors, 0, ddof=1)
        rows.append([name, *(f"{m:.3f} +- {s:.3f}" for m, s in zip(mean, sd, strict=True))])
    table(rows, ["table, 30 % holes", "this", "mean", "5 nearest", "iterative", "in 90 % intervals"])


def condition(given: argparse.Namespace) -> None:
    """log p(x | y) - log p(x) on the same rows, of two programs that are alike but for y, and within the conditional one.

    Within one model, p(x) = sum_y p(x | y) / 10, a label is worth log 10 at most; two trained apart are bound by nothing.
    """
    x, y, test, truth = binary(given.data, given.data_root)
    how = {"epochs": given.epochs, "batch_size": 100}
    results = []
    for model, data, of in (("conditional", (x, y), truth[: given.rows]), ("mlp", x, None)):
        program = pv.build(model, "diagonal", x[:8], latent_dim=given.latent_dim)
        pv.fit(program, data, validation=0.1, **how)
        results.append(pv.log_likelihood(program, test[: given.rows], of, num_samples=given.samples).log_likelihood)
        if of is not None:
            each = [
                pv.log_likelihood(
                    program, test[: given.rows], torch.full_like(of, k), num_samples=given.samples, seed=1 + k
                )
                for k in range(10)
            ]
            inside = torch.stack([one.log_likelihood for one in each]).logsumexp(0) - math.log(10)
    gain, within = results[0] - results[1], results[0] - inside
    print(
        f"within the conditional model: {float(within.mean()):.3f} +- {float(within.std()) / math.sqrt(len(within)):.3f} nats"
    )
    gain = results[0] - results[1]
    print(f"log p(x | y) {float(results[0].mean()):.3f}, log p(x) {float(results[1].mean()):.3f}: ", end="")
    print(
        f"gain {float(gain.mean()):.3f} +- {float(gain.std()) / math.sqrt(len(gain)):.3f} nats (log 10 = {math.log(10):.3f})"
    )


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"labels": labels, "halves": halves, "tables": tables, "condition": condition}
    parser.add_argument("part", choices=list(parts))
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-root")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--labels", type=int, default=100)
    parser.add_argument("--alpha", type=float, default=50.0)
    parser.add_argument(
        "--m1", action="store_true", help="labels: M2 on the latents of a VAE that knows no labels (M1 + M2)"
    )
    parser.add_argument("--hidden", default="[500,500]", help="labels: units of each layer of encoder and decoder")
    parser.add_argument("--latent-dim", type=int, default=20)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--samples", type=int, default=2000)
    given = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)
        parts[given.part](given)


if __name__ == "__main__":
    main()
