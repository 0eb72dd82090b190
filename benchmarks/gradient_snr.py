"""Signal-to-noise ratio of the guide's gradient against K: IWAE's falls, DReG's rises.

    python benchmarks/gradient_snr.py [--draws 1000]

On a small VAE a little away from its optimum, |mean| / standard deviation of each parameter's gradient, averaged over the
guide's parameters (Rainforth et al. 2018; Tucker et al. 2019). Writes docs/figures/gradient-snr.png and prints the table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

import pyro_vae as pv
from pyro_vae import registry

FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "gradient-snr.png"


def ratio(program: torch.nn.Module, x: torch.Tensor, name: str, num_particles: int, draws: int) -> float:
    """Mean over the guide's parameters of |E g| / sd(g)."""
    objective = registry.get("objectives", name)(num_particles=num_particles)
    guide = [p for n, p in program.named_parameters() if n.startswith(("encoder", "posterior"))]
    rows = []
    for _ in range(draws):
        _, surrogate = objective(program, x)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(surrogate, guide)]))
    grads = torch.stack(rows)
    return float((grads.mean(0).abs() / grads.std(0).clamp(min=1e-12)).mean())


def main() -> None:
    """Measure, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = pv.load_data("digits")
    program = pv.build("mlp", "diagonal", data, latent_dim=5, **{"decoder.hidden": [20], "encoder.hidden": [20]})
    pv.fit(program, data, epochs=100, lr=5e-3)
    program = program.double()
    with torch.no_grad():  # a little away from the optimum, where there is a signal to find
        for p in program.parameters():
            p.add_(0.01 * torch.randn_like(p))
    x = data.observed("train", rows=torch.arange(16)).double()
    table = {name: [ratio(program, x, name, k, args.draws) for k in args.particles] for name in ("iwae", "dreg")}
    print("| K | IWAE | DReG |\n|---|---|---|")
    for i, k in enumerate(args.particles):
        print(f"| {k} | {table['iwae'][i]:.3f} | {table['dreg'][i]:.3f} |")
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    ax = figure.add_subplot()
    for name, label in (("iwae", "IWAE"), ("dreg", "DReG")):
        ax.loglog(args.particles, table[name], "o-", label=label)
    ax.set(xlabel="draws per image, K", ylabel="signal-to-noise ratio", title="Gradient of the guide")
    ax.legend()
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=120)


if __name__ == "__main__":
    main()
