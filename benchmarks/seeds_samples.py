"""The systems of seeds_table.py by their samples and their codes: precision, recall, nearest training data, linear probes.

    python benchmarks/seeds_samples.py [--work runs/seeds] [--found rbm=runs/rbm] [--num 2000]

Reads the directories of the rows that are trained, and trains nothing but a small classifier, in whose features precision and
recall are found; what is drawn are pixels (of a GAN, its images), held against as many test images of the same kind. A second set
of test images stands beside them as what a perfect model would get. Static MNIST is filed without labels: the classifier and the
probes have MNIST as binarized by us. Tables go to benchmarks/results/seeds_samples.md, a picture with a row of samples for each
system to docs/figures/seeds-samples.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from seeds_table import RESULTS, ROWS, TABLES
from torch import Tensor

import pyro_vae as pv
from pyro_vae.analysis.drawing import image_grid, save
from pyro_vae.analysis.features import linear_probe
from pyro_vae.analysis.fidelity import classifier_features, fidelity
from pyro_vae.baselines import training

FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "seeds-samples.png"
SHOWN = 12


def opened(name: str, out: Path) -> tuple[Any, Any] | None:
    """The program or baseline of a row, and its data; None where it is not trained."""
    if not (out / "evaluation.json").is_file():
        return None
    if ROWS[name].baseline:
        return training.load_trained(out), training.load_data(out, training.read(out), None)
    run = pv.load(out)
    return run.program, run.load_data()


def drawn(system: Any, num: int) -> Tensor:
    """Pixels of ``num`` samples."""
    if isinstance(system, training.Baseline):
        return system.sample(num, 0, mean=False)
    return pv.sample(system, num, mean=False, seed=0)


def main() -> None:
    """Compare what is trained, table by table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--found", action="append", default=[], metavar="ROW=DIR")
    parser.add_argument("--num", type=int, default=2000)
    args = parser.parse_args()
    elsewhere = dict(pair.split("=", 1) for pair in args.found)
    lines, pictures, found = [], [], {}
    for table, title in TABLES.items():
        systems = {
            n: made
            for n, row in ROWS.items()
            if row.table == table and (made := opened(n, Path(elsewhere.get(n, args.work / n))))
        }
        if not systems:
            continue
        data = next(iter(systems.values()))[1]
        train, test = data.observed("train"), data.observed("test")
        test = test[
            torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
        ]  # a file may be in the order of classes
        labelled = data if table == "grey" else pv.load_data("mnist")
        features = classifier_features(labelled.observed("train"), labelled.labels["train"])
        half = min(args.num, len(test) // 2)
        judged = {"test images": fidelity(test[half : 2 * half], test[:half], train, features)}
        for name, (system, _) in systems.items():
            samples = drawn(system, half)
            judged[ROWS[name].title] = fidelity(samples, test[:half], train, features)
            pictures.append(samples[:SHOWN])
        lines += [f"**{title}**", "", "| system | precision | recall | nearest training image |", "|---|---|---|---|"]
        for name, f in judged.items():
            near = "-" if f.nearest is None else f"{f.nearest:.2f}"
            lines.append(
                f"| {name} | {f.precision:.3f} +- {f.precision_se:.3f} | {f.recall:.3f} +- {f.recall_se:.3f} | {near} |"
            )
        coders = {n: coder(n, Path(elsewhere.get(n, args.work / n)), system) for n, (system, _) in systems.items()}
        lines += ["", *probes(coders, labelled), ""]
        found[table] = {name: vars(f) for name, f in judged.items()}
    text = "\n".join(lines) or "no row is trained yet"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "seeds_samples.json").write_text(json.dumps(found, indent=2) + "\n")
    (RESULTS / "seeds_samples.md").write_text(text + "\n")
    if pictures:
        save(image_grid(torch.cat(pictures), SHOWN), FIGURE)
    print(text)


def coder(name: str, out: Path, system: Any) -> Any:
    """What makes the codes: of an autoencoder and a VAE-GAN the encoder that was trained with them, and not the later guide."""
    words = ROWS[name].train.split()
    if words[:2] in (["baseline", "autoencoder"], ["baseline", "vae-gan"]):
        return getattr(training.load(out, training.read(out))[0], "program", None)
    return getattr(system, "program", system)


def probes(coders: dict[str, Any], data: pv.Data) -> list[str]:
    """Accuracy of linear classifiers on the guide's means of what has continuous latents, on pixels and on PCA."""
    programs = {ROWS[n].title: program for n, program in coders.items() if has_codes(program)}
    if not programs:
        return []
    x, y = zip(*((data.observed(split), data.labels[split]) for split in ("train", "test")), strict=True)
    table = linear_probe(programs, x[0], y[0], x[1], y[1], num_labels=(10, 100, 1000), num_seeds=3)
    mean, spread = table.mean("seed"), table.std("seed")
    head = [
        "| linear probe on | " + " | ".join(f"{n} labels" for n in table.num_labels.values) + " |",
        "|---|---|---|---|",
    ]
    return head + [
        f"| {name} | "
        + " | ".join(f"{float(m):.3f} +- {float(s):.3f}" for m, s in zip(mean[i], spread[i], strict=True))
        + " |"
        for i, name in enumerate(table.representation.values)
    ]


def has_codes(program: Any) -> bool:
    """Whether it is a declared program with continuous latents."""
    posterior = getattr(program, "posterior", None)
    return posterior is not None and "real" in repr(getattr(posterior, "support", "")).lower()


if __name__ == "__main__":
    main()
