"""Signal-to-noise ratio of the guide's gradient against K: IWAE's falls, DReG's rises.

    python benchmarks/gradient_snr.py [--draws 400]

The linear-Gaussian model of Rainforth et al. 2018 (https://arxiv.org/abs/1802.04537), section 4: z ~ N(mu, I), x | z ~ N(z, I)
in 20 dimensions, guide N(A x + b, 2/3 I), all parameters 0.01 away from their optimum. The ratio is |mean| / standard
deviation of each of the guide's gradients, averaged over parameters; with n draws, pure noise has sqrt(2 / (pi n)). Writes
docs/figures/gradient-snr.png and prints the table.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from pyro_vae import registry

FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "gradient-snr.png"
DIM, ROWS, AWAY = 20, 16, 0.01


class LinearGaussian(nn.Module):
    """The model and guide of the paper, as a Program."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.encoder = nn.Parameter(torch.randn(DIM)), nn.Linear(DIM, DIM)
        with torch.no_grad():
            self.encoder.weight.copy_(torch.eye(DIM) / 2)
            self.encoder.bias.copy_(self.loc / 2)

    def model(self, x: Tensor) -> None:
        """p(z) p(x | z)."""
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x)."""
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Normal(self.encoder(x), math.sqrt(2 / 3)).to_event(1))


def ratio(program: nn.Module, x: Tensor, name: str, num_particles: int, draws: int) -> float:
    """Mean over the guide's parameters of |E g| / sd(g)."""
    objective = registry.get("objectives", name)(num_particles=num_particles)
    guide = [p for n, p in program.named_parameters() if n.startswith("encoder")]
    rows = []
    for _ in range(draws):
        _, surrogate = objective(program, x)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(surrogate, guide)]))
    grads = torch.stack(rows)
    return float((grads.mean(0).abs() / grads.std(0).clamp(min=1e-12)).mean())


def main() -> None:
    """Measure, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    program = LinearGaussian().double()
    x = program.loc.detach() + math.sqrt(2) * torch.randn(ROWS, DIM).double()
    with torch.no_grad():
        for p in program.parameters():
            p.add_(AWAY * torch.randn_like(p))
    noise = math.sqrt(2 / math.pi / args.draws)
    table = {name: [ratio(program, x, name, k, args.draws) for k in args.particles] for name in ("iwae", "dreg")}
    print(f"{args.draws} draws; pure noise reads {noise:.3f}\n\n| K | IWAE | DReG |\n|---|---|---|")
    for i, k in enumerate(args.particles):
        print(f"| {k} | {table['iwae'][i]:.3f} | {table['dreg'][i]:.3f} |")
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    ax = figure.add_subplot()
    for name, label in (("iwae", "IWAE"), ("dreg", "DReG")):
        ax.loglog(args.particles, table[name], "o-", label=label)
    ax.axhline(noise, color="grey", linestyle=":", label="pure noise")
    ax.set(xlabel="draws per image, K", ylabel="signal-to-noise ratio", title="Gradient of the guide")
    ax.legend()
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=120)


if __name__ == "__main__":
    main()
