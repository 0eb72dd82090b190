"""Records through the functions that take data: evaluation, scores, reconstructions, gaps; data sets whose rows are records."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run as command
from record_programs import M2, JointGaussian, gaussian_data, m2_data

import pyro_vae as pv
from pyro_vae import Record
from pyro_vae.analysis.anomaly import detect
from pyro_vae.data.columned import counts_of, in_columns, thinned
from pyro_vae.data.load import load_whole
from pyro_vae.evaluation.evaluate import comparable
from pyro_vae.programs.columns import taken

pytestmark = pytest.mark.filterwarnings("ignore:Pareto k", "ignore:none of", "ignore:the model makes nothing")

SMALL: dict[str, Any] = {"latent_dim": 2, "encoder": "mlp:hidden=[8]", "decoder": "mlp:hidden=[8]"}


def npz(path: Path, record: Record) -> Path:
    """A record as a file of arrays by name, with a mask of each column."""
    arrays = {n: record[n].numpy() for n in record} | {f"{n}_present": record.present[n].numpy() for n in record}
    np.savez(path, **arrays)
    return path


def test_what_is_evaluated_is_what_is_present() -> None:
    """The NLL is that of log_likelihood; columns are no units unless all of one is missing; bits have no unit."""
    program, record = M2(), m2_data(30)
    figures, result = pv.evaluate(program, record, num_samples=60)
    alone = pv.log_likelihood(program, record, num_samples=60)
    assert torch.equal(result.log_likelihood, alone.log_likelihood)
    assert figures["nll"] == alone.nll
    assert figures["bits_per_dim"] is None
    assert len(figures["active_units"]) == 1  # of z
    missing = Record({"image": record["image"], "label": record["label"]}, {"label": torch.zeros(30, dtype=torch.bool)})
    with pytest.warns(UserWarning, match="'label' .Categorical. has no mean"):
        figures, _ = pv.evaluate(program, missing, num_samples=60)
    assert len(figures["active_units"]) == 2
    json.dumps(figures, allow_nan=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the ascent has not converged, or the guide is richer")
def test_rate_and_gaps_of_columns_are_those_of_the_closed_form() -> None:
    """KL of the guide to the prior of rows with holes; the gap of a diagonal normal, and of a guide that is too wide."""
    program = JointGaussian()
    record, values, known = gaussian_data(program, 40)
    mean, precision = program.posterior(values, known)
    covariance = torch.linalg.inv(precision) * program.wide**2
    trace = covariance.diagonal(dim1=1, dim2=2).sum(1)
    kl = 0.5 * (trace + mean.square().sum(1) - 2 - torch.logdet(covariance))
    found = pv.latent_information(program, record, num_samples=200)
    assert abs(found.rate - float(kl.mean())) < 0.05  # 40 x 200 draws of terms that vary by about 1
    assert found.num_active == 2
    gaps = pv.inference_gaps(program, record, num_steps=150, num_final_draws=400, lr=0.03)
    diagonal = 0.5 * (precision.diagonal(dim1=1, dim2=2).log().sum(1) - torch.logdet(precision))
    too_wide = program.wide**2 - 1 - 2 * math.log(program.wide)
    whole = float((gaps.log_likelihood - gaps.elbo).mean())
    assert abs(whole - too_wide) < 5 * float(gaps.elbo_se.square().sum().sqrt()) / 40
    assert abs(float((gaps.approximation - diagonal).mean())) < 0.02
    with pytest.raises(pv.UserError, match="draws the column 'c' in some rows"):
        pv.inference_gaps(JointGaussian(draws=True), record)


def test_scores_and_reconstructions() -> None:
    """A row scores alike alone; means of columns are the decoder's at the guide's mean; data against themselves score alike."""
    program, record = M2(), m2_data(20)
    whole = pv.score(program, record, num_samples=10, warn=False)
    for row in (5, 6):  # one without its label, and one with it
        alone = pv.score(program, record[row : row + 1], num_samples=10, warn=False)
        assert torch.equal(alone.log_likelihood, whole.log_likelihood[row : row + 1])
    z, made = pv.encode(program, record), pv.reconstruct(program, record)
    assert isinstance(z, dict)
    logits = program.of_label[z["label"]] + z["z"] @ program.decoder
    assert torch.allclose(made["image"], logits.sigmoid().detach())
    assert torch.allclose(made["label"], program.prior.softmax(0).detach().expand(20, 3))
    assert pv.reconstruct(program, record, num_samples=3)["image"].shape == (3, 20, 6)
    found = detect(program, record, record, record, num_samples=10)
    assert found.auroc["nll"] == 0.5
    with pytest.raises(pv.UserError, match="traversals takes no records"):
        pv.traversals(program, record)  # type: ignore[arg-type]


def test_a_file_of_columns_is_a_data_set(tmp_path: Path) -> None:
    """Split, trained with validation, saved, loaded, evaluated and resumed to the bit; a file that changed is refused."""
    record = m2_data(60)
    path = npz(tmp_path / "rows.npz", record)
    data = pv.load_data(path)
    assert (len(data.train), len(data.validation), len(data.test)) == (48, 6, 6)
    seen = data.observed("test")
    assert torch.equal(seen["image"], record["image"][data.rows["test"]])
    assert torch.equal(seen.present["label"], record.present["label"][data.rows["test"]])
    how: dict[str, Any] = {"batch_size": 16, "objective": "elbo:label_weight=1.0"}
    run = pv.fit(M2(), data, epochs=2, out=tmp_path / "run", **how)
    assert "validation_loss" in run.metrics[0]
    loaded = pv.load(tmp_path / "run", program=M2(seed=5))
    figures = [pv.evaluate(r.program, r.load_data(), num_samples=26)[0]["nll"] for r in (run, loaded)]
    assert figures[0] == figures[1]
    pv.fit(M2(), pv.load_data(path), epochs=2, out=tmp_path / "parts", callback=lambda m: m["epoch"] == 1, **how)
    again = pv.fit(M2(), pv.load_data(path), epochs=2, out=tmp_path / "parts", resume=True, **how)
    assert all(torch.equal(a, b) for a, b in zip(run.program.parameters(), again.program.parameters(), strict=True))
    npz(path, m2_data(60, seed=7))
    with pytest.raises(pv.UserError, match="no longer holds"):
        loaded.load_data()


def test_nan_of_a_file_is_missing_only_if_it_is_said(tmp_path: Path) -> None:
    """By ``present='nan'``, or an array of booleans."""
    values = np.array([[1.0, np.nan], [2.0, 3.0], [4.0, 5.0]])
    np.savez(tmp_path / "a.npz", a=values, b=np.arange(3))
    with pytest.raises(pv.UserError, match="'a' has NaN: say"):
        pv.load_data(tmp_path / "a.npz")
    with pytest.raises(pv.UserError, match="'a' has NaN: say"):
        load_whole(tmp_path / "a.npz")
    assert len(load_whole(tmp_path / "a.npz", present="nan").test) == 3
    data = pv.load_data(tmp_path / "a.npz", present="nan", validation=1)
    found = torch.cat([data.observed(split).present["a"] for split in ("train", "validation", "test")])
    assert int((~found).sum()) == 1
    np.savez(tmp_path / "b.npz", a=values, a_present=~np.isnan(values))
    assert pv.load_data(tmp_path / "b.npz").columns[0].missing != "no"  # type: ignore[index]


def test_labels_that_are_present_are_declared(tmp_path: Path) -> None:
    """As many of each class, by the seed; none validate; images are those of the data without columns; and what is refused."""
    data = pv.load_data("digits", present="label=30,seed=4")
    program = pv.build("semi-supervised", "diagonal", data, **SMALL)
    run = pv.fit(program, data, steps=2, batch_size=32)
    kept = run.load_data()
    train, test = kept.observed("train"), kept.observed("test")
    assert torch.bincount(train["label"][train.present["label"]]).tolist() == [3] * 10
    assert not bool(kept.observed("validation").present["label"].any())
    assert bool(test.present["label"].all())
    assert torch.equal(test["x"], data.observed("test"))
    other = thinned(in_columns(pv.load_data("digits"), program.columns), "label=30,seed=5", "train").observed("train")
    assert not torch.equal(other.present["label"], train.present["label"])
    assert int(other.present["label"].sum()) == 30
    with pytest.raises(pv.UserError, match="present in 1,439 rows of the train split, and 5,000"):
        pv.fit(program, pv.load_data("digits", present="label=5000"), steps=1)
    with pytest.raises(pv.UserError, match="no column 'lable': did you mean 'label'"):
        pv.fit(program, pv.load_data("digits", present="lable=50"), steps=1)
    with pytest.raises(pv.UserError, match="VAE reads x"):
        pv.fit(pv.build("mlp", "diagonal", data, **SMALL), data, steps=1)
    with pytest.raises(pv.UserError, match="expected COLUMN=ROWS"):
        counts_of("label")
    np.save(tmp_path / "x.npy", np.zeros((20, 8, 8), dtype=np.uint8))
    with pytest.raises(pv.UserError, match="has x of shape"):
        pv.fit(program, pv.load_data(tmp_path / "x.npy"), steps=1)


def test_images_some_of_which_are_labelled_are_read_from_a_file(tmp_path: Path) -> None:
    """Bytes are grey levels, prepared as those without a mask are; what is left out of a file is named."""
    x, label = np.random.default_rng(0).integers(0, 256, (40, 1, 4, 4)).astype(np.uint8), np.arange(40) % 3
    np.savez(tmp_path / "some.npz", x=x, label=label, label_present=label > 0)
    np.savez(tmp_path / "all.npz", x=x, label=label)
    some = pv.load_data(tmp_path / "some.npz", binarization="dynamic", validation=4)
    whole = pv.load_data(tmp_path / "all.npz", binarization="dynamic", validation=4)
    assert (some.levels, whole.levels) == (256, 256)
    assert torch.equal(some.observed("test")["x"], whole.observed("test"))
    assert not bool(some.observed("test").present["label"].all())
    np.savez(tmp_path / "two.npz", x=x, other=x, label=label, label_present=label > 0)
    with pytest.raises(pv.UserError, match="one column of grey levels"):
        pv.load_data(tmp_path / "two.npz")
    np.savez(tmp_path / "more.npz", x=x, age=label / 2, label=label)
    with pytest.warns(UserWarning, match="age is left out"):
        assert pv.load_data(tmp_path / "more.npz").columns is None


def test_rows_with_and_without_labels_are_compared_by_what_all_have() -> None:
    """log p(x) of some rows against log p(x, label) of others told them apart by their labels."""
    program, record = M2(), m2_data(12)
    with_labels = record.only(["image", "label"])
    without = Record({n: record[n] for n in record}, {"label": torch.zeros(12, dtype=torch.bool)})
    a, b = comparable(program, taken(program, with_labels), taken(program, without))
    assert torch.equal(pv.score(program, a, warn=False).log_likelihood, pv.score(program, b, warn=False).log_likelihood)


def test_a_column_called_x_is_x() -> None:
    """Two columns of one shape were exchanged where another came first."""
    x, y = torch.arange(6.0)[:, None], torch.arange(10.0, 16.0)[:, None]
    data = pv.Data("d", x, x[:0], x, levels=None, labels={"train": y, "validation": None, "test": y})
    found = in_columns(data, {"t": (1,), "x": (1,)}).observed("test")
    assert torch.equal(found["x"], x)
    assert torch.equal(found["t"], y)
    with pytest.raises(pv.UserError, match="no rows"):
        pv.score(M2(), m2_data(4)[:0])


@pytest.mark.slow
def test_columns_from_the_command_line(tmp_path: Path) -> None:
    """train, evaluate, impute, score, anomaly, compare, report, reconstruct and resume, of a file and of a data set."""
    path = npz(tmp_path / "rows.npz", Record({"x": m2_data(60)["image"].float(), "label": torch.arange(60) % 3}))
    out, own = str(tmp_path / "run"), str(tmp_path / "own")
    small = ["--set", "latent_dim=2", "--quiet"]
    status, _, said = command(
        "train", "digits", "--model", "semi-supervised", "--present", "label=100", "--objective", "elbo:label_weight=20",
        "--epochs", "2", "--out", out, *small,
    )  # fmt: skip
    assert status == 0, said
    status, _, said = command(
        "train", str(path), "--model", "semi-supervised", "--set", "program.classes=3", "--epochs", "2", "--out", own,
        *small,
    )  # fmt: skip
    assert status == 0, said
    for arguments in (
        ["train", "digits", "--resume", "--epochs", "3", "--out", out, "--quiet"],
        ["impute", out, "digits", "--present", "label=0", "--out", str(tmp_path / "a.npz"), "--samples", "20"],
        ["impute", own, str(path), "--out", str(tmp_path / "b.npz"), "--samples", "20"],
        ["score", own, str(path), "--samples", "20", "--quiet"],
        ["anomaly", out, "digits", "--samples", "20", "--limit", "20", "--quiet"],
        ["compare", own, own, "--samples", "30", "--quiet"],
        ["report", out, "--quiet"],
        ["reconstruct", out],
        ["sample", out, "--given", "label=7"],
        ["prove", own, "--limit", "5"],
    ):
        status, _, said = command(*arguments)
        assert status == 0 or (arguments[0] == "impute" and "nothing is missing" in said), (arguments, said)
    figures = []
    for present in ([], ["--present", "label=0"], ["--present", "label=0"]):
        status, printed, said = command(
            "evaluate", out, "--samples", "30", "--limit", "40", "--json", "--quiet", *present
        )
        assert status == 0, said
        figures.append(json.loads(printed)["nll"])
    assert figures[1] == figures[2]
    assert 0 < figures[0] - figures[1] < 4  # -log p(label | x) of a model that has hardly learned


@pytest.mark.slow
@pytest.mark.parametrize("discrete", [False, True])
def test_a_program_by_hand_goes_through_every_function(tmp_path: Path, discrete: bool) -> None:
    """One that is none of ours: finite numbers of the right shape from each, and a reason from those that take tensors alone."""
    from pyro_vae.analysis.mcmc import sample_chains
    from pyro_vae.analysis.pictures import reconstructions

    make: Any = M2 if discrete else lambda: JointGaussian(draws=True)
    program, record = make(), m2_data(40) if discrete else gaussian_data(JointGaussian(), 40)[0]
    how: dict[str, Any] = {"epochs": 2, "batch_size": 16, "out": tmp_path / "run"}
    run = pv.fit(program, record, **how)
    few = record[:4]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        annealing = pv.Annealing(num_chains=2, num_distributions=5)
        for options in (
            {"num_samples": 60},
            {"num_samples": 60, "compile": "on"},
            {"num_samples": 500, "target_se": 0.1},
        ):
            assert math.isfinite(pv.evaluate(program, record, **options)[0]["nll"])
        assert math.isfinite(pv.evaluate(program, few, method=annealing)[0]["nll"])
        assert len(pv.annealed_log_likelihood(program, few, num_chains=2, num_distributions=5)) == 4
        assert pv.score(program, few, num_samples=30).columns()["row"] == [0, 1, 2, 3]
        assert set(pv.reconstruct(program, few)) == set(record.names)
        assert set(pv.sample_columns(program, 3)) == set(record.names)
        for source in ("guide", "psis"):
            tree = pv.posterior(program, few, num_samples=30, num_chains=2, source=source)
            assert bool(np.isfinite(tree["posterior"]["z"].values).all())
        assert sample_chains(program, few, num_samples=5, num_warmup=5, num_chains=2) is not None
        assert pv.impute(program, record, num_samples=30).ess.shape == (40,)
        assert math.isfinite(pv.latent_information(program, record).rate)
        assert bool(torch.isfinite(pv.bound_curve(program, few, num_samples=30).bound).all())
        assert pv.prove(program, record, num_rows=20).verdict == "not proved"
        assert pv.embedding(program, record) is not None
        assert reconstructions(program, few) is not None
        assert pv.report(run, limit=20, num_samples=30).is_file()
        both = [pv.log_likelihood(program, record, num_samples=60, seed=seed) for seed in (0, 1)]
        assert pv.compare(*both).p_value > 1e-4
        again = pv.load(tmp_path / "run", program=make())
        assert pv.score(again.program, few, num_samples=9).log_likelihood.equal(
            pv.score(program, few, num_samples=9).log_likelihood
        )
        assert len(pv.fit(make(), record, **{**how, "epochs": 3}, resume=True).metrics) == 3
        for refused in (pv.traversals, pv.aggregate_posterior, pv.reconstruction_uncertainty):
            with pytest.raises(pv.UserError, match="takes no records"):
                refused(program, few)
        with pytest.raises(pv.UserError, match="no model says"):
            pv.evaluate(program, few, method=annealing, simulated=True)
