"""Data as a newcomer has them: each trains, is evaluated, sampled from and reported, with one option more at most."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse
from sklearn.datasets import load_breast_cancer
from test_data_given import holes
from test_data_published import caltech, omniglot, write_images, write_mnist

from pyro_vae.cli.app import run as command

RNG = np.random.default_rng(0)
PROGRAM = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_data_given import Covariates as program\n"


def cancer(path: Path) -> None:
    found = load_breast_cancer()
    names = ",".join([name.replace(" ", "_") for name in found.feature_names] + ["target"])
    np.savetxt(path, np.c_[found.data, found.target], delimiter=",", header=names, comments="")


def faces(path: Path) -> None:
    for split, n in (("train", 40), ("test", 12)):
        write_images(path / split, n, size=16)


DATA: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "fashion": (write_mnist, ["--binarization", "dynamic"]),
    "caltech.npz": (lambda path: np.savez(path, **caltech()), []),
    "omniglot.npz": (lambda path: np.savez(path, **omniglot()), ["--likelihood", "continuous-bernoulli"]),
    "olivetti": (faces, ["--binarization", "dynamic"]),
    "cancer.csv": (cancer, ["--likelihood", "normal:scale=per-pixel"]),
    "counts.npz": (
        lambda path: sparse.save_npz(path, sparse.csr_matrix(RNG.poisson(2.0, (100, 20)))),
        ["--model", "poisson"],
    ),
    "series.npy": (
        lambda path: np.save(path, RNG.standard_normal((80, 6, 3)) * [1, 10, 100]),
        ["--likelihood", "normal:scale=per-pixel"],
    ),
    "holes.npz": (lambda path: np.savez(path, x=holes(), y=RNG.standard_normal((60, 2))), ["--model", "own.py"]),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
@pytest.mark.parametrize("name", DATA)
def test_from_a_path_to_a_report(name: str, tmp_path: Path) -> None:
    make, option = DATA[name]
    make(tmp_path / name)
    (tmp_path / "own.py").write_text(PROGRAM)
    option = [str(tmp_path / "own.py") if o == "own.py" else o for o in option]
    out = str(tmp_path / "run")
    assert (
        command(["train", str(tmp_path / name), *option, "--epochs", "2", "--quiet", "--compile", "off", "--out", out])
        == 0
    )
    own = option if "own.py" in " ".join(option) else []
    assert command(["evaluate", out, "--samples", "50", "--quiet", *own]) == 0
    assert command(["sample", out, *own]) == 0
    assert command(["report", out, "--samples", "20", "--limit", "10", *own]) == 0
    assert (Path(out) / "report.html").is_file()
