"""The first week, by three people in twenty steps each: one serves a model, one writes a thesis, one doubts the numbers."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.datasets import load_breast_cancer
from test_standings import OWN
from typed import Typed

import pyro_vae as pv
from pyro_vae.evaluation.export import noise_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning"),
]


@pytest.fixture(scope="class")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("week")


def lines(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


class TestServer:
    """One trains on a table, and serves its scores."""

    def test_01_a_table_is_trained(self, typed: Typed, folder: Path) -> None:
        x = load_breast_cancer().data
        for name, rows in (("table.csv", x[:500]), ("new.csv", x[500:]), ("one.csv", x[512:513])):
            np.savetxt(folder / name, rows, delimiter=",", fmt="%.8g")
        how = "--likelihood normal:scale=per-pixel --epochs 60 --compile off --quiet"
        typed(f"train table.csv {how} --checkpoint-epochs 20 --out runs/table")

    def test_02_every_row_of_a_file_gets_a_line(self, typed: Typed) -> None:
        typed("score runs/table new.csv --samples 200 --quiet")
        assert len(lines(typed.out)) == 69

    def test_03_a_row_alone_scores_as_in_the_file(self, typed: Typed) -> None:
        typed("score runs/table new.csv --samples 200 --quiet")
        every = lines(typed.out)
        typed("score runs/table one.csv --samples 200 --quiet")
        assert lines(typed.out)[0]["log_likelihood"] == every[12]["log_likelihood"]

    def test_04_a_threshold_is_taken_from_rows_that_are_none(self, folder: Path) -> None:
        run = pv.load(folder / "runs/table")
        held = pv.score(run.program, run.load_data().observed("validation"), num_samples=200).log_likelihood
        (folder / "threshold").write_text(str(float(held.quantile(0.05))))

    def test_05_verdicts_are_in_the_file(self, typed: Typed, folder: Path) -> None:
        threshold = (folder / "threshold").read_text()
        typed(f"score runs/table new.csv --samples 200 --threshold {threshold} --out scores.csv --quiet")
        verdicts = [line["verdict"] for line in lines((folder / "scores.csv").read_text())]
        assert set(verdicts) == {"normal", "anomaly"}
        assert f"{verdicts.count('anomaly')} of them below" in typed.out

    def test_06_and_in_the_figures(self, typed: Typed, folder: Path) -> None:
        typed(f"score runs/table new.csv --samples 200 --threshold {(folder / 'threshold').read_text()} --json --quiet")
        assert json.loads(typed.out)["num_rows"] == 69

    def test_07_the_tables_own_file_may_be_gone(self, typed: Typed, folder: Path) -> None:
        (folder / "table.csv").rename(folder / "gone.csv")
        typed("score runs/table one.csv --samples 20 --quiet")
        (folder / "gone.csv").rename(folder / "table.csv")

    def test_08_anomaly_scores_all_rows_too(self, typed: Typed, folder: Path) -> None:
        typed("anomaly runs/table new.csv --samples 100 --quiet")
        assert "69 rows of new.csv against 50 of table.csv" in typed.out
        assert len(lines((folder / "runs/table/anomaly.csv").read_text())) == 69

    def test_09_the_wrong_table_is_refused_in_a_line(self, typed: Typed, folder: Path) -> None:
        np.savetxt(folder / "narrow.csv", np.ones((4, 3)) * 2.5, delimiter=",")
        typed("score runs/table narrow.csv --quiet", status=2)
        assert "do not fit a program for (30,)" in typed.err

    def test_10_parquet_needs_its_package(self, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        typed("score runs/table one.csv --out scores.parquet --quiet", status=2)
        assert "pip install pyarrow" in typed.err

    def test_11_four_threads_score_as_one(self, folder: Path) -> None:
        program, x = pv.load(folder / "runs/table").program, torch.from_numpy(load_breast_cancer().data)
        whole = pv.score(program, x, num_samples=50, warn=False).log_likelihood
        random = np.random.default_rng(0)
        requests = [torch.from_numpy(random.integers(0, len(x), random.integers(1, 65))) for _ in range(50)]
        with ThreadPoolExecutor(4) as pool:
            answers = pool.map(lambda rows: pv.score(program, x[rows], num_samples=50, warn=False), requests)
        for rows, answer in zip(requests, answers, strict=True):
            torch.testing.assert_close(answer.log_likelihood, whole[rows], rtol=1e-5, atol=0)

    def test_12_a_server_answers_rows_with_columns(self, folder: Path) -> None:
        program = pv.load(folder / "runs/table").program

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                try:
                    status, answer = 200, pv.score(program, torch.tensor(rows), num_samples=50, warn=False).columns()
                except pv.UserError as error:
                    status, answer = 400, {"error": [str(error)]}
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            def log_message(self, *arguments: Any) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_address[1]}"
            ask = lambda rows: urllib.request.urlopen(url, json.dumps(rows).encode(), timeout=60)  # noqa: E731
            with ask(load_breast_cancer().data[:3].tolist()) as reply:
                assert json.load(reply)["row"] == [0, 1, 2]
            with pytest.raises(urllib.error.HTTPError) as refused:
                ask([[1.0, 2.0]])
            assert "expected data" in json.load(refused.value)["error"][0]
            refused.value.close()
            server.shutdown()

    def test_13_warnings_are_one_sentence_or_none(self, folder: Path) -> None:
        program, x = pv.load(folder / "runs/table").program, torch.from_numpy(load_breast_cancer().data)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for i in range(0, 60, 20):
                pv.score(program, x[i : i + 20], num_samples=50)
        assert len({str(w.message) for w in caught}) <= 1

    def test_14_what_cannot_be_scored_is_named(self, folder: Path) -> None:
        x = torch.from_numpy(load_breast_cancer().data[:4].copy())
        x[2, 3] = torch.nan
        with pytest.raises(pv.UserError, match="row 2"):
            pv.score(pv.load(folder / "runs/table").program, x)

    def test_15_a_density_is_exported(self, typed: Typed, folder: Path) -> None:
        typed("export runs/table --only density --only posterior --samples 50")
        assert (folder / "runs/table/export/density.pt2").is_file()

    def test_16_and_scores_as_python_does(self, folder: Path) -> None:
        program, x = pv.load(folder / "runs/table").program, torch.from_numpy(load_breast_cancer().data[:9]).float()
        graph = torch.export.load(folder / "runs/table/export/density.pt2").module()
        found = graph(x, noise_of(program, x, num_samples=50))["log_likelihood"]
        torch.testing.assert_close(found, pv.score(program, x, num_samples=50).log_likelihood, rtol=1e-5, atol=0)

    def test_17_more_epochs_for_the_served_run(self, typed: Typed, folder: Path) -> None:
        typed("train --resume --out runs/table --epochs 70 --quiet")
        assert len(pv.load(folder / "runs/table").metrics) == 70

    def test_18_a_new_run_begins_with_its_weights(self, typed: Typed, folder: Path) -> None:
        typed("train --from runs/table --epochs 5 --lr 1e-4 --compile off --quiet --out runs/next")
        assert pv.load(folder / "runs/next").record["lineage"]["parent"] == str(folder / "runs/table")

    def test_19_and_says_so_in_the_list(self, typed: Typed) -> None:
        typed("runs --json")
        assert {r["run"]: r["parent"] for r in json.loads(typed.out)["runs"]}["next"].endswith("runs/table")

    def test_20_rows_that_are_asked_for_have_posteriors(self, typed: Typed, folder: Path) -> None:
        typed("posterior runs/next --rows 3,17 --samples 20 --out z.nc --quiet")
        import xarray as xr

        with xr.open_datatree(folder / "z.nc") as tree:
            assert tree.posterior["image"].values.tolist() == [3, 17]


PRIORS, GUIDES, SEEDS = ("standard-normal", "vamp:components=10"), ("diagonal", "full-rank"), (0, 1, 2)


class TestThesis:
    """One compares priors and guides over seeds."""

    def test_01_to_12_a_sweep(self, typed: Typed) -> None:
        for prior in PRIORS:
            for guide in GUIDES:
                for seed in SEEDS:
                    out = f"runs/{prior.partition(':')[0]}-{guide}-{seed}"
                    how = "--set latent_dim=6 --epochs 15 --compile off --quiet"
                    typed(f"train digits --model mlp --prior {prior} --guide {guide} --seed {seed} {how} --out {out}")

    def test_13_one_table(self, typed: Typed, folder: Path) -> None:
        runs = " ".join(str(p.relative_to(folder)) for p in sorted((folder / "runs").iterdir()))
        how = "--group --baseline standard-normal-diagonal --samples 200 --limit 150 --quiet"
        typed(f"compare {runs} {how} --format latex --figure differences.pdf")
        assert typed.out.count("$\\pm$") >= 4
        assert len(re.findall(r"^\S+ & .* & 3 & ", typed.out, re.MULTILINE)) == 4
        assert (folder / "differences.pdf").stat().st_size > 5000

    def test_14_in_all_digits(self, typed: Typed, folder: Path) -> None:
        runs = " ".join(str(p.relative_to(folder)) for p in sorted((folder / "runs").iterdir()))
        typed(f"compare {runs} --group --samples 50 --limit 50 --format csv --quiet")
        assert [line["seeds"] for line in lines(typed.out)] == ["3"] * 4

    def test_15_the_list_of_runs_as_a_table(self, typed: Typed) -> None:
        typed("runs --format latex")
        assert typed.out.count("bernoulli") == 12

    def test_16_an_optimizer_with_options_and_a_schedule(self, typed: Typed, folder: Path) -> None:
        how = "--optimizer adamw:weight_decay=0.1,betas=[0.9,0.99] --schedule cosine:warmup=0.1 --accumulate 2 --dtype float64"
        typed(f"train digits --model mlp --set latent_dim=6 --epochs 3 {how} --compile off --quiet --out more/adamw")
        assert pv.load(folder / "more/adamw").record["training"]["optimizer"]["weight_decay"] == 0.1

    def test_17_burdas_schedule_is_a_word(self, typed: Typed, folder: Path) -> None:
        how = "--objective iwae:num_particles=5 --batch-size 20 --lr 1e-3 --schedule stages --optimizer adam:eps=1e-4"
        typed(
            f"train digits --model mlp --set latent_dim=6 --epochs 4 {how} --average 0 --compile off --quiet --out more/iwae"
        )
        rates = [m["lr"] for m in pv.load(folder / "more/iwae").metrics]
        assert rates == sorted(rates, reverse=True)

    def test_18_programs_in_files_are_swept_by_their_arguments(self, typed: Typed, folder: Path) -> None:
        np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32))
        (folder / "own.py").write_text(OWN)
        for latent in (1, 2):
            typed(
                f"train x.npy --model own.py --set latent={latent} --epochs 3 --compile off --quiet --out files/{latent}"
            )
        typed("compare files/1 files/2 --model own.py --samples 50 --limit 30 --quiet")
        assert "files/1" in typed.out

    def test_19_a_comment_more_is_no_other_program(self, typed: Typed, folder: Path) -> None:
        (folder / "own.py").write_text("# mine\n" + OWN)
        typed("evaluate files/1 --model own.py --samples 20 --quiet")
        (folder / "own.py").write_text(OWN.replace("0.5", "0.4"))
        typed("evaluate files/1 --model own.py --samples 20 --quiet", status=2)
        typed("evaluate files/1 --model own.py --samples 20 --quiet --trust-program")

    def test_20_python_runs_the_package(self, folder: Path) -> None:
        command = [sys.executable, "-m", "pyro_vae", "runs", str(folder / "runs")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.count("\n") == 14


MIXING = np.random.default_rng(3).normal(size=(2, 5))


def gaussian(n: int, seed: int) -> torch.Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.normal(size=(n, 2)) @ MIXING + 0.5 * random.normal(size=(n, 5))).float()


def truth(x: torch.Tensor) -> np.ndarray:
    found: np.ndarray = multivariate_normal(np.zeros(5), MIXING.T @ MIXING + 0.25 * np.eye(5)).logpdf(x.numpy())
    return found


class TestStatistician:
    """One holds the numbers against a density that is known."""

    runs: dict[str, pv.Run] = {}  # noqa: RUF012

    def fitted(self, guide: str, seed: int) -> pv.Run:
        name = f"{guide}-{seed}"
        if name not in self.runs:
            vae = pv.build("ppca", guide, (5,), latent_dim=2, seed=seed)
            how: dict[str, Any] = {"epochs": 150, "batch_size": 100, "lr": 0.02, "compile": "off"}
            self.runs[name] = pv.fit(vae, gaussian(1000, 0), seed=seed, **how)
        return self.runs[name]

    @pytest.mark.parametrize("seed", [0, 1, 2])
    @pytest.mark.parametrize("guide", ["linear", "linear-full-rank"])
    def test_01_to_06_models_are_trained(self, guide: str, seed: int) -> None:
        assert len(self.fitted(guide, seed).metrics) == 150

    def test_07_scores_are_the_truth(self) -> None:
        x = gaussian(200, 1)
        scores = pv.score(self.fitted("linear-full-rank", 0).program, x, num_samples=200)
        assert float((scores.log_likelihood - torch.from_numpy(truth(x))).abs().mean()) < 0.2

    def test_08_streams_have_one_law(self) -> None:
        """Both estimate the same: a z-test over 200 rows, two-sided at 1e-4."""
        program, x = self.fitted("linear", 0).program, gaussian(200, 1)
        a, b = (pv.log_likelihood(program, x, num_samples=200, streams=s) for s in ("place", "content"))
        difference = (a.log_likelihood - a.bias) - (b.log_likelihood - b.bias)
        assert abs(float(difference.sum())) < 3.9 * float((a.mc_se.square() + b.mc_se.square()).sum().sqrt())

    def test_09_another_seed_is_another_draw(self) -> None:
        program, x = self.fitted("linear", 0).program, gaussian(50, 1)
        a, b = (pv.score(program, x, num_samples=50, seed=s).log_likelihood for s in (0, 1))
        assert not bool((a == b).any())

    def test_10_a_threshold_holds_its_level(self) -> None:
        """1 % of 2,000 new rows lie below the 1 % quantile of 2,000 others, within a binomial of both at 1e-4."""
        program = self.fitted("linear-full-rank", 0).program
        old, new = (pv.score(program, gaussian(2000, s), num_samples=20, streams="place") for s in (4, 5))
        threshold = float(old.log_likelihood.quantile(0.01))
        assert 2 <= int((new.log_likelihood < threshold).sum()) <= 48

    def test_11_seeds_are_compared_with_what_they_do(self) -> None:
        x = gaussian(300, 1)
        found = [
            [pv.log_likelihood(self.fitted(g, s).program, x, num_samples=100) for s in range(3)]
            for g in ("linear", "linear-full-rank")
        ]
        paired = pv.compare(*found)
        assert paired.by_seed is not None
        assert paired.interval[0] <= paired.mean <= paired.interval[1]
        single = pv.compare(found[0][0], found[1][0])
        assert paired.interval[1] - paired.interval[0] > 0
        assert single.by_seed is None

    def test_12_of_two_seeds_the_interval_is_wider_than_of_one_and_the_same(self) -> None:
        x = gaussian(300, 1)
        one = pv.log_likelihood(self.fitted("linear", 0).program, x, num_samples=100)
        two = pv.log_likelihood(self.fitted("linear-full-rank", 0).program, x, num_samples=100)
        assert pv.compare([one, one], [two, two]).se == pytest.approx(pv.compare(one, two).se)

    def test_13_an_objective_of_ones_own(self) -> None:
        from pyro_vae.programs.trace import draw_terms

        def iwae(program: Any, x: torch.Tensor) -> torch.Tensor:
            return -draw_terms(program, x, num_samples=5).log_weight.logsumexp(0).mean() + float(np.log(5))

        vae = pv.build("ppca", "linear", (5,), latent_dim=2)
        run = pv.fit(vae, gaussian(1000, 0), objective=iwae, epochs=100, lr=0.02, compile="off")
        assert run.metrics[-1]["train_loss"] < -truth(gaussian(1000, 0)).mean() + 0.5

    def test_14_a_schedule_of_ones_own(self) -> None:
        run = pv.fit(
            pv.build("ppca", "linear", (5,), latent_dim=2),
            gaussian(500, 0),
            epochs=3,
            schedule=lambda step: 0.1 / (1 + step),
        )
        assert run.metrics[0]["lr"] == 0.1

    def test_15_parts_of_a_minibatch_train_the_same_model(self) -> None:
        x, nll = gaussian(300, 1), []
        for parts in (1, 4):
            vae = pv.build("ppca", "linear-full-rank", (5,), latent_dim=2)
            pv.fit(vae, gaussian(1000, 0), epochs=100, batch_size=100, lr=0.02, accumulate=parts, compile="off")
            nll.append(pv.log_likelihood(vae, x, num_samples=100).nll)
        assert nll[0] == pytest.approx(nll[1], abs=0.1)
        assert nll[0] == pytest.approx(-truth(x).mean(), abs=0.2)

    def test_16_weight_decay_shrinks(self) -> None:
        norms = []
        for decay in (0.0, 1.0):
            vae = pv.build("ppca", "linear", (5,), latent_dim=2)
            optimizer = {"name": "adamw", "weight_decay": decay}
            pv.fit(vae, gaussian(500, 0), epochs=60, lr=0.02, schedule="constant", optimizer=optimizer, compile="off")
            norms.append(float(sum(p.detach().square().sum() for p in vae.parameters())))
        assert norms[1] < 0.9 * norms[0]

    def test_17_the_compiled_step_takes_the_options(self) -> None:
        found = []
        for compile in ("off", "on"):
            vae = pv.build("ppca", "linear", (5,), latent_dim=2)
            how: dict[str, Any] = {
                "optimizer": "adamw:weight_decay=0.3,betas=[0.5,0.9]",
                "schedule": "cosine:warmup=0.2",
            }
            pv.fit(vae, gaussian(256, 0), epochs=3, batch_size=64, compile=compile, **how)
            found.append(torch.cat([p.detach().flatten() for p in vae.parameters()]))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)

    def test_18_more_epochs_are_a_longer_run(self, folder: Path) -> None:
        x, how = gaussian(200, 0), {"batch_size": 50, "schedule": "constant", "compile": "off"}
        new = lambda: pv.build("ppca", "linear", (5,), latent_dim=2)  # noqa: E731
        whole = pv.fit(new(), x, epochs=6, **how)
        pv.fit(new(), x, epochs=3, out=folder / "a", **how)
        longer = pv.fit(new(), x, epochs=6, out=folder / "a", resume=True, **how)
        for a, b in zip(whole.program.parameters(), longer.program.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_19_a_warm_start_says_of_what(self, folder: Path) -> None:
        child = pv.fit(pv.load(folder / "a").program, gaussian(200, 0), epochs=1, compile="off", out=folder / "b")
        assert child.record["lineage"] == pv.load(folder / "b").record["lineage"]
        assert Path(child.record["lineage"]["parent"]).name == "a"

    def test_20_float64_is_told_no_rounding(self) -> None:
        vae = self.fitted("linear", 0).program
        result = pv.log_likelihood(vae, gaussian(20, 1), num_samples=50)
        assert result.rounding_error is not None
        vae.double()
        assert pv.log_likelihood(vae, gaussian(20, 1), num_samples=50).rounding_error is None
