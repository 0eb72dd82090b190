"""A newcomer's first hours with a table: twenty steps in order, each with the outcome that the user sees."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import norm
from sklearn.datasets import load_breast_cancer
from typed import Typed

import pyro_vae as pv
from pyro_vae.training.standardize import UnevenColumnsWarning

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning"),
]


@pytest.fixture(scope="class")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


def cancer() -> np.ndarray:
    found: np.ndarray = load_breast_cancer().data
    return found


class TestTable:
    def test_01_a_table_as_filed_is_trained_and_the_advice_is_taken(self, typed: Typed, folder: Path) -> None:
        names = ",".join(name.replace(" ", "_") for name in load_breast_cancer().feature_names)
        np.savetxt(folder / "cancer.csv", cancer(), delimiter=",", header=names, comments="", fmt="%.8g")
        options = "--epochs 60 --compile off --quiet"
        with pytest.warns(UnevenColumnsWarning, match="scale=per-pixel"):
            typed(f"train cancer.csv --likelihood normal {options} --out runs/one-scale")
        typed(f"train cancer.csv --likelihood normal:scale=per-pixel {options} --out runs/a")
        assert "validation ELBO" in typed.err
        assert "kept epoch" in typed.err
        assert typed.out.strip().endswith("runs/a")

    def test_02_the_run_can_be_read_without_the_library(self, folder: Path) -> None:
        lines = [json.loads(line) for line in (folder / "runs/a/metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 60
        assert lines[-1]["validation_objective"] < lines[0]["validation_objective"]
        assert "cancer.csv" in (folder / "runs/a/spec.toml").read_text()

    def test_03_the_likelihood_is_that_of_the_data_as_filed(self, typed: Typed, folder: Path) -> None:
        typed("evaluate runs/a --samples 200 --json --quiet")
        figures = json.loads(typed.out)
        data = pv.load_data(folder / "cancer.csv")
        train, test = (data.observed(split).double().numpy() for split in ("train", "test"))
        independent = -norm(train.mean(0), train.std(0)).logpdf(test).sum(1).mean()
        assert figures["num_data"] == len(test)
        assert figures["nll"] < independent - 5  # nats per row; what the columns have to do with each other
        assert figures["active_units"][0] > 0

    def test_04_the_table_of_it_is_for_reading(self, typed: Typed) -> None:
        typed("evaluate runs/a --samples 100 --split validation --no-save --quiet")
        assert "| NLL" in typed.out
        assert "nats per image" in typed.out
        assert "validation" in typed.out

    def test_05_samples_are_in_the_units_of_the_table(self, typed: Typed, folder: Path) -> None:
        typed("sample runs/a --out x.npy --num 400 --draws")
        x = np.load(folder / "x.npy")
        assert x.shape == (400, 30)
        spread = cancer().std(0)
        assert (np.abs(x.mean(0) - cancer().mean(0)) < spread).all()
        assert (np.abs(np.log(x.std(0) / spread)) < 1).all()  # within a factor of e, over scales from 0.002 to 569

    def test_06_and_as_a_picture(self, typed: Typed, folder: Path) -> None:
        typed("sample runs/a --out samples.pdf")
        assert (folder / "samples.pdf").read_bytes().startswith(b"%PDF")

    def test_07_rows_come_back_through_the_latents(self, folder: Path) -> None:
        run = pv.load(folder / "runs/a")
        x = run.load_data().observed("test")
        back = pv.reconstruct(run.program, x)
        correlation = [np.corrcoef(x[:, d].numpy(), back[:, d].numpy())[0, 1] for d in range(30)]
        assert np.median(correlation) > 0.7

    def test_08_a_likelihood_for_other_data_is_refused_with_one_that_fits(self, typed: Typed) -> None:
        assert typed("train cancer.csv --likelihood poisson --out runs/no", status=2)
        assert "normal" in typed.err
        assert typed.err.count("\n") == 1

    def test_09_and_one_that_is_misspelt_with_the_nearest(self, typed: Typed, folder: Path) -> None:
        typed("train cancer.csv --likelihood noraml --out runs/no", status=2)
        assert "did you mean 'normal'" in typed.err
        assert not (folder / "runs/no").exists()

    def test_10_a_hole_is_named_by_its_row_and_column(self, typed: Typed, folder: Path) -> None:
        x = cancer()
        x[17, 3] = np.nan
        np.save(folder / "holes.npy", x)
        typed("train holes.npy --likelihood normal:scale=per-pixel --out runs/no", status=2)
        assert "row 17 of" in typed.err
        assert "column 3" in typed.err

    def test_11_another_model_by_a_word(self, typed: Typed) -> None:
        with pytest.warns(UnevenColumnsWarning):
            typed(
                "train cancer.csv --model ppca --guide linear-full-rank --epochs 60 --compile off --quiet --out runs/ppca"
            )
        assert "trained" in typed.err

    def test_12_which_of_the_two_is_better(self, typed: Typed, folder: Path) -> None:
        typed("compare runs/a runs/ppca --samples 200 --json --quiet --report both.html")
        found = json.loads(typed.out)
        assert len(found["runs"]) == 2
        better = found["comparisons"][0]
        assert better["difference"] > 50  # a scale for each column explains more than one for all
        assert "runs/a" in (folder / "both.html").read_text()

    def test_13_what_a_declaration_stands_for(self, typed: Typed) -> None:
        typed("show ppca linear-full-rank")
        assert "N(0, I)" in typed.out
        assert "pyro.sample" in typed.out

    def test_14_rows_that_do_not_belong(self, typed: Typed, folder: Path) -> None:
        shuffled = np.random.default_rng(0).permuted(cancer(), axis=0)  # each column as it was, and no row
        np.save(folder / "shuffled.npy", shuffled[:150])
        typed("anomaly runs/a shuffled.npy --samples 100 --json --quiet")
        found = json.loads(typed.out)
        assert max(v for v in _numbers(found) if v <= 1) > 0.8

    def test_15_the_latents_posterior_for_arviz(self, typed: Typed, folder: Path) -> None:
        typed("posterior runs/a --images 3 --samples 50 --out latents.nc --quiet")
        with xr.open_datatree(folder / "latents.nc") as tree:
            assert tree.posterior["z"].sizes["image"] == 3
            assert tree.posterior["z"].sizes["draw"] == 50

    def test_16_a_page_of_it_all(self, typed: Typed, folder: Path) -> None:
        typed("report runs/a --samples 30 --limit 50 --out report.html")
        page = (folder / "report.html").read_text()
        assert "test NLL" in page
        assert "http://" not in page.replace("http://www.w3.org", "")  # it loads nothing

    def test_17_a_table_that_has_changed_is_refused(self, typed: Typed, folder: Path) -> None:
        text = (folder / "cancer.csv").read_text()
        (folder / "cancer.csv").write_text(text.replace("17.99", "71.99", 1))
        typed("evaluate runs/a --samples 20 --quiet", status=2)
        assert "changed" in typed.err
        (folder / "cancer.csv").write_text(text)

    def test_18_one_that_has_moved_is_found_where_it_is_said_to_be(self, typed: Typed, folder: Path) -> None:
        (folder / "elsewhere").mkdir()
        (folder / "cancer.csv").rename(folder / "elsewhere/cancer.csv")
        typed("evaluate runs/a --samples 20 --quiet", status=2)
        assert "--data-root" in typed.err
        typed("evaluate runs/a --samples 20 --quiet --data-root elsewhere --no-save")
        assert "| NLL" in typed.out

    def test_19_the_same_from_python_with_an_array(self, typed: Typed) -> None:
        x = cancer()
        vae = pv.build("mlp", "diagonal", x, likelihood="normal:scale=per-pixel", latent_dim=5)
        run = pv.fit(vae, x, epochs=20, validation=0.1, compile="off")
        figures, result = pv.evaluate(run.program, x, num_samples=50)
        assert len(result) == len(x)
        assert figures["nll"] < 50  # 21,513 where columns are not put into standard units
        assert pv.encode(run.program, x).shape == (569, 5)

    def test_20_the_number_is_the_same_tomorrow(self, typed: Typed, folder: Path) -> None:
        run = pv.load(folder / "runs/a")
        x = run.load_data(root=str(folder / "elsewhere")).observed("test")
        twice = [pv.log_likelihood(run.program, x, num_samples=50, seed=3).log_likelihood for _ in range(2)]
        assert torch.equal(*twice)


def _numbers(tree: object) -> list[float]:
    if isinstance(tree, dict):
        return [n for value in tree.values() for n in _numbers(value)]
    if isinstance(tree, list):
        return [n for value in tree for n in _numbers(value)]
    return [float(tree)] if isinstance(tree, (int, float)) and not isinstance(tree, bool) else []
