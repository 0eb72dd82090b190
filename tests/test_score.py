"""Scores of rows: by themselves, in any batch, from any thread, in files, with verdicts."""

from __future__ import annotations

import csv
import json
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import conjugate
import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae.cli.app import run as command
from pyro_vae.errors import unsaid, warn
from pyro_vae.evaluation.result import UnreliableEstimateWarning
from pyro_vae.seeding import digest, generator
from pyro_vae.tables import comma_separated, latex, write_columns


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")  # few draws
@pytest.mark.parametrize("noise", ["random", "sobol"])
def test_a_row_scores_the_same_wherever_it_stands(noise: str) -> None:
    program, x = conjugate.LinearGaussian(scale=1.3), conjugate.data(12)
    how: dict[str, Any] = {"num_samples": 64, "streams": "content", "noise": noise}
    whole = pv.log_likelihood(program, x, **how)
    for rows in ([11], [3, 0, 7], list(range(11, -1, -1)), [5, 5]):
        part = pv.log_likelihood(program, x[rows], **how)
        for name in ("log_likelihood", "mc_se", "khat", "kl"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows]), name
    placed = [pv.log_likelihood(program, x[rows], num_samples=64, noise=noise).log_likelihood for rows in ([0], [3, 0])]
    assert placed[0][0] != placed[1][1]
    other = pv.log_likelihood(program, x, **how, seed=1).log_likelihood
    assert not (other == whole.log_likelihood).any()
    # the same law: 12 rows, their errors known; 1e-4
    z = (whole.log_likelihood - whole.bias - program.evidence(x)) / whole.mc_se
    assert float(z.square().sum()) < 39.1


def test_a_pilot_and_y_belong_to_the_row() -> None:
    program, x = conjugate.LinearGaussian(scale=1.3), conjugate.data(6)
    how: dict[str, Any] = {"num_samples": 2000, "target_se": 0.02, "streams": "content"}
    whole, last = (pv.log_likelihood(program, rows, **how) for rows in (x, x[5:]))
    assert last.log_likelihood == whole.log_likelihood[5:]
    assert digest(x[:1], torch.tensor([1])) != digest(x[:1], torch.tensor([2]))
    with pytest.raises(pv.UserError, match="unknown streams 'contents': did you mean 'content'"):
        pv.log_likelihood(program, x, streams="contents")


def test_threads_score_as_one_does() -> None:
    program, x = conjugate.LinearGaussian(), conjugate.data(24)
    whole = pv.score(program, x, num_samples=30).log_likelihood
    with ThreadPoolExecutor(4) as pool:
        spans = [slice(i, i + 1 + i % 4) for i in range(0, 24, 2)]
        parts = list(pool.map(lambda s: pv.score(program, x[s], num_samples=30).log_likelihood, spans))
    for span, part in zip(spans, parts, strict=True):
        assert torch.equal(part, whole[span])


def test_a_service_is_warned_in_the_same_words_or_not_at_all() -> None:
    program, x = conjugate.LinearGaussian(scale=0.3), conjugate.data(30)
    said = set()
    for rows in (x[:1], x[1:9], x):
        with pytest.warns(UnreliableEstimateWarning) as caught:
            scores = pv.score(program, rows, num_samples=100)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert any("Pareto k" in line for line in scores.warnings)
        said.add(str(caught[0].message))
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pv.score(program, x, num_samples=100, warn=False)


def test_what_one_thread_keeps_to_itself_another_says() -> None:
    inside, done = threading.Event(), threading.Event()

    def silent() -> list[str]:
        with unsaid(UserWarning) as kept:
            inside.set()
            done.wait(10)
            warn("kept")
        return kept

    with ThreadPoolExecutor(1) as pool:
        kept = pool.submit(silent)
        inside.wait(10)
        with pytest.warns(UserWarning, match="said"):
            warn("said")
        done.set()
        assert kept.result() == ["kept"]


def test_a_fixed_threshold_gives_verdicts_and_a_file_has_every_row(tmp_path: Path) -> None:
    program, x = conjugate.LinearGaussian(), conjugate.data(40)
    x[7] += 30
    exact = program.evidence(x)
    scores = pv.score(program, x, num_samples=40, threshold=float(exact.quantile(0.1)))
    assert scores.anomalous is not None
    assert bool(scores.anomalous[7])
    assert int(scores.anomalous.sum()) == 4
    with scores.write(tmp_path / "scores.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [int(line["row"]) for line in lines] == list(range(40))
    assert [float(line["log_likelihood"]) for line in lines] == scores.log_likelihood.tolist()
    assert {line["verdict"] for line in lines} == {"normal", "anomaly"}
    assert pv.score(program, x, num_samples=40).anomalous is None


def test_tables_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert latex(["a", "b"], [["x_1 & 2", "3 +- 1"]]).splitlines()[4] == r"x\_1 \& 2 & 3 $\pm$ 1 \\"
    assert comma_separated(["a", "b"], [["x, y", None]]) == 'a,b\n"x, y",\n'
    with pytest.raises(pv.UserError, match=r"ends in .csv or .parquet, got .*x.txt"):
        write_columns(tmp_path / "x.txt", {"a": [1]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(pv.UserError, match="pip install pyarrow"):
        write_columns(tmp_path / "x.parquet", {"a": [1]})
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 300 rows of a table, a run on them and one on them as a tensor in memory."""
    folder = tmp_path_factory.mktemp("table")
    x = conjugate.data(300).numpy()
    np.save(folder / "table.npy", x)
    program = pv.build("ppca", "linear", (5,), latent_dim=2)
    pv.fit(program, pv.load_data(folder / "table.npy"), epochs=1, compile="off", out=folder / "run")
    pv.fit(
        pv.build("ppca", "linear", (5,), latent_dim=2), torch.from_numpy(x), epochs=1, compile="off", out=folder / "memory"
    )  # fmt: skip
    return folder


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")  # an untrained guide
def test_the_score_command(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, x = str(table / "run"), np.load(table / "table.npy")
    few, many = tmp_path / "few.csv", tmp_path / "many.npy"
    np.save(many, x[::5])
    np.savetxt(few, x[[250, 20]], delimiter=",", header="a,b,c,d,e", comments="")
    common = ["--samples", "30", "--quiet"]

    def rows(*arguments: str) -> list[dict[str, str]]:
        assert command(["score", *arguments, *common]) == 0
        return list(csv.DictReader(capsys.readouterr().out.splitlines()))

    every = rows(run, str(many))
    assert len(every) == 60
    assert [r["log_likelihood"] for r in rows(run, str(few))] == [every[i]["log_likelihood"] for i in (50, 4)]
    assert len(rows(str(table / "memory"), str(few))) == 2
    (table / "table.npy").rename(table / "away.npy")  # the run's own data are not needed
    try:
        assert len(rows(run, str(few))) == 2
    finally:
        (table / "away.npy").rename(table / "table.npy")
    out = tmp_path / "scores.csv"
    low = sorted(float(r["log_likelihood"]) for r in every)[10]
    told = ["--threshold", str(low), "--out", str(out)]
    assert command(["score", run, str(many), *told, *common, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["num_rows"], figures["num_anomalies"]) == (60, 10)
    assert sum(r["verdict"] == "anomaly" for r in csv.DictReader(out.read_text().splitlines())) == 10
    for wrong, message in (
        (["nowhere.npy"], "there is no file"),
        ([str(few), "--out", "x.txt"], "ends in .csv or .parquet"),
        ([str(few), "--streams", "row"], "unknown streams"),
        ([str(few), "--threshold", "high"], "--threshold"),
        (["digits"], "do not fit a program for (5,)"),
    ):
        assert command(["score", run, *wrong, *common]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
def test_the_anomaly_command_files_every_row(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.npy"
    np.save(other, 3 * np.load(table / "table.npy")[::-1].copy())
    arguments = ["anomaly", str(table / "run"), str(other), "--samples", "20", "--threshold", "-30", "--quiet"]
    assert command([*arguments, "--scores", str(tmp_path / "rows.csv")]) == 0
    assert "300 rows of other.npy against 30 of table.npy" in capsys.readouterr().out
    with (tmp_path / "rows.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [int(line["row"]) for line in lines] == list(range(300))
    assert {line["verdict"] for line in lines} == {"normal", "anomaly"}
    assert all((float(line["nll"]) > 30) == (line["verdict"] == "anomaly") for line in lines)
    assert command([*arguments, "--limit", "25", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["num_other"] == 25
    with (table / "run" / "anomaly.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 25


@pytest.mark.slow
def test_a_served_model(table: Path) -> None:
    """1,000 requests of 1 to 64 rows from four threads are the same rows scored in one call."""
    program = pv.load(table / "run").program
    x = torch.from_numpy(np.load(table / "table.npy"))
    random = generator("test: requests")
    sizes = torch.randint(1, 65, (1000,), generator=random).tolist()
    requests = [torch.randint(0, len(x), (n,), generator=random) for n in sizes]
    whole = pv.score(program, x, num_samples=50, warn=False).log_likelihood
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda rows: pv.score(program, x[rows], num_samples=50, warn=False).log_likelihood, requests)
    for rows, answer in zip(requests, answers, strict=True):
        torch.testing.assert_close(answer, whole[rows], rtol=1e-5, atol=0)


def test_equal_rows_share_their_noise_and_their_error() -> None:
    """Of 16 equal rows the mean is no surer than one; -0 and 0 are one number."""
    vae = pv.build("ppca", "linear", (3,), latent_dim=2, seed=0)
    one = pv.score(vae, torch.tensor([[0.5, 0.0, 0.0]]), num_samples=400).result
    row = torch.tensor([[0.5, -0.0, 0.0]])
    many = pv.score(vae, row.repeat(16, 1), num_samples=400).result
    assert torch.equal(many.log_likelihood, one.log_likelihood.expand(16))
    assert many.nll_mc_se == pytest.approx(one.nll_mc_se)
    assert many.nll_interval == pytest.approx(one.nll_interval)
    assert pv.log_likelihood(vae, row.repeat(16, 1), num_samples=400).nll_mc_se < 0.4 * one.nll_mc_se


def test_a_row_is_prepared_by_its_content() -> None:
    # 1,797 x 64 Bernoulli draws of their levels: means over the data agree to 5 errors
    data = pv.load_data("digits", binarization="dynamic")
    rows = torch.tensor([5, 3, 90, 3])
    whole = data.observed("train", streams="content")
    assert torch.equal(data.observed("train", rows=rows, streams="content"), whole[rows])
    assert torch.equal(whole[3], data.observed("train", rows=[3], streams="content")[0])
    assert not torch.equal(whole, data.observed("train", seed=1, streams="content"))
    mean = data.train[:].double() / (data.levels - 1)
    error = float((mean * (1 - mean)).sum()) ** 0.5 / whole.numel()
    assert abs(float(whole.double().mean() - mean.mean())) < 5 * error
