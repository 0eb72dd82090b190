"""Which epoch is kept: by the objective's own value on validation data, at the end of its schedules; and what is said of it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from small import small, small_vae
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import registry
from pyro_vae.cli.app import run as command
from pyro_vae.programs.trace import evaluating
from pyro_vae.seeding import generator, seeded
from pyro_vae.training.selection import Validation, kept

OLD = Path(__file__).parent / "old_runs"  # of commit adcbbde, stopped after 4 of 6 epochs
# What these went on to, at that commit, when they were not stopped.
OLD_GOES_ON = {"elbo": (4460.175862630209, 4398.314127604167), "iwae": (4620.192599826389, 4565.265245225694)}
HASTY: dict[str, Any] = {"lr": 0.02, "batch_size": 8, "schedule": "constant", "average": None, "compile": "off"}


def noise(folder: Path) -> pv.Data:
    """Forty rows of coin flips: what is learned of them is learned by heart, and validation soon gets worse."""
    np.save(folder / "noise.npy", np.random.default_rng(0).random((40, 20)) < 0.5)
    return pv.load_data(folder / "noise.npy", validation=12)


def made(name: str, **options: Any) -> Any:
    return registry.get("objectives", name)(
        **registry.validate("objectives", name, {**small("objectives", name), **options})
    )


def weights(program: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in program.state_dict().items()}


@pytest.mark.parametrize("name", registry.names("objectives"))
def test_every_objective_keeps_the_epoch_of_its_own_lowest_value(name: str, tmp_path: Path) -> None:
    data = noise(tmp_path)
    discrete = {"prior": "bernoulli", "posterior": "bernoulli"} if name == "enumerated-elbo" else {}
    vae, states = small_vae(data, **discrete), []
    run = pv.fit(vae, data, epochs=12, objective=name, **HASTY, callback=lambda m: states.append(weights(vae)))
    values = [m["validation_objective"] for m in run.metrics]
    assert [m["kept_epoch"] for m in run.metrics] == [1 + int(np.argmin(values[: i + 1])) for i in range(len(values))]
    assert run.kept.epoch == 1 + int(np.argmin(values))
    assert run.kept.value == min(values)
    assert all(torch.equal(t, states[run.kept.epoch - 1][n]) for n, t in vae.state_dict().items())
    split = (data.observed("validation"), None)
    again = Validation(split, made(name), HASTY["batch_size"]).measure(vae)
    assert again["validation_objective"] == min(values)
    assert name in str(run.kept)


def test_the_value_is_the_mean_over_rows_of_what_is_minimised(tmp_path: Path) -> None:
    data = noise(tmp_path)
    vae, x = small_vae(data), data.observed("validation")
    many = {}
    for name, options in {"iwae": {"num_particles": 50}, "elbo": {"beta": 4.0}, "renyi": {"num_particles": 50}}.items():
        objective = made(name, **options)
        found = Validation((x, None), objective, 5).measure(vae)["validation_objective"]
        with evaluating(vae), torch.random.fork_rng():
            torch.manual_seed(0)
            values = torch.stack([objective.value(vae, x) for _ in range(200)])
        many[name] = float(values.mean())
        assert abs(found - many[name]) < 5 * float(values.std())
    assert many["elbo"] > many["iwae"]


def test_an_objective_over_batches_is_valued_on_full_batches_of_mixed_rows(tmp_path: Path) -> None:
    data = noise(tmp_path)
    validation = Validation((data.observed("validation"), None), made("mmd"), 5)
    assert [len(b) for b in validation.batches] == [5, 5, 5]
    assert set(torch.cat(list(validation.batches)).tolist()) == set(range(12))
    assert torch.cat(list(validation.batches)).tolist() != sorted(torch.cat(list(validation.batches)).tolist())


def test_the_scales_of_a_program_are_in_its_value() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.out = nn.Linear(4, 4), nn.Linear(2, 4)

        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                with pyro.poutine.scale(scale=3.0):
                    pyro.sample("x", dist.Normal(self.out(z), 1.0).to_event(1), obs=x)

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                loc, raw = self.net(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    x = torch.randn(30, 4, generator=generator("test of selection"))
    with seeded(0):
        program = Weighted()
    found = Validation((x, None), made("elbo"), 10).measure(program)
    expected = found["validation_kl"] - 3 * found["validation_reconstruction"]
    assert found["validation_objective"] == pytest.approx(expected, rel=0.2)
    assert found["validation_objective"] > 1.5 * found["validation_loss"]


@pytest.mark.parametrize(("warmup", "first"), [(0, 1), (8, 3), (9, 3), (10, 4), (24, 7)])
def test_no_epoch_of_a_warm_up_is_kept(warmup: int, first: int, tmp_path: Path) -> None:
    """Four steps an epoch; with next to no weight on the KL at first, the value falls before it rises."""
    data = noise(tmp_path)
    objective = f"elbo:warmup_steps={warmup}"
    run = pv.fit(small_vae(data), data, epochs=8, objective=objective, **{**HASTY, "batch_size": 6}, patience=7)
    values = [math.inf if m.get("warm_up") else m["validation_objective"] for m in run.metrics]
    assert next(m["epoch"] for m in run.metrics if not m.get("warm_up")) == first
    assert run.kept.epoch == 1 + int(np.argmin(values)) >= first
    assert [m["kept_epoch"] for m in run.metrics[: first - 1]] == list(range(1, first))


def test_a_training_that_ends_within_its_warm_up_keeps_the_last_and_says_so(tmp_path: Path) -> None:
    data = noise(tmp_path)
    vae, states = small_vae(data), []
    run = pv.fit(
        vae, data, epochs=6, patience=2, objective="elbo:warmup_steps=1000", **HASTY,
        callback=lambda m: states.append(weights(vae)),
    )  # fmt: skip
    assert len(run.metrics) == 6
    assert run.kept.epoch == 6
    assert "within the warm-up of 1000 steps" in str(run.kept)
    assert all(torch.equal(t, states[-1][n]) for n, t in vae.state_dict().items())


def test_the_last_is_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    data = noise(tmp_path)
    vae, states = small_vae(data), []
    run = pv.fit(vae, data, epochs=12, **HASTY, keep="last", callback=lambda m: states.append(weights(vae)))
    assert int(np.argmin([m["validation_objective"] for m in run.metrics])) < 11
    assert run.kept.epoch == 12
    assert "the last" in str(run.kept)
    assert all(torch.equal(t, states[-1][n]) for n, t in vae.state_dict().items())


def test_data_without_a_validation_split_keep_the_last_and_say_so() -> None:
    run = pv.fit(small_vae(x := torch.zeros(20, 4)), x, epochs=3, **HASTY)
    assert run.kept.epoch == 3
    assert "no validation split" in str(run.kept)


def test_values_that_are_not_finite_are_not_the_best() -> None:
    lines = [{"epoch": e, "validation_objective": v} for e, v in enumerate([math.nan, 3.0, 2.0, math.inf], 1)]
    assert kept(lines, {"objective": "elbo", "keep": "best"}).epoch == 3
    assert "finite" in kept(lines[:1], {"objective": "elbo", "keep": "best"}).why


def test_the_stated_noise_is_that_of_the_draws(tmp_path: Path) -> None:
    """With 8 draws, sd / sigma lies in [0.38, 1.73] for all but one in a thousand (chi^2 of 7); the seeds are fixed."""
    data = noise(tmp_path)
    vae = small_vae(data)
    for name in ("elbo", "iwae"):
        validation = Validation((data.observed("validation"), None), made(name), 8)
        stated = validation.noise(vae)
        values = [validation._value(vae, validation.batches, draw) for draw in range(100, 500)]
        assert 0.38 < stated / float(np.std(values)) < 1.73


@pytest.mark.usefixtures("coarse_pages")
def test_output_metrics_and_report_say_which_epoch_was_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise(tmp_path)
    out = tmp_path / "run"
    line = [
        "train",
        tmp_path / "noise.npy",
        "--model",
        "mlp",
        "--set",
        "latent_dim=3",
        "--lr",
        "0.02",
        "--batch-size",
        "8",
    ]
    capsys.readouterr()
    assert (
        command(
            [*map(str, line), "--objective", "iwae:num_particles=3", "--epochs", "12", "--quiet", "--out", str(out)]
        )
        == 0
    )
    said = capsys.readouterr().err
    run = pv.load(out)
    assert run.noise is not None
    assert str(run.kept) in said
    assert "noise of its draws" in str(run.kept)
    assert run.metrics[-1]["kept_epoch"] == run.kept.epoch
    assert str(run.kept)[1:] in pv.report(run, tmp_path / "page.html", limit=4, num_samples=10).read_text()


@pytest.mark.parametrize("name", ["elbo", "iwae"])
def test_a_run_of_an_older_version_loads_and_resumes_as_it_was(name: str, tmp_path: Path) -> None:
    shutil.copytree(OLD / name, tmp_path / "run")
    run = pv.load(tmp_path / "run")
    assert run.kept.epoch == 4
    assert "ELBO" in run.kept.why
    assert command(["train", "--resume", "--out", str(tmp_path / "run"), "--data-root", str(OLD), "--quiet"]) == 0
    run = pv.load(tmp_path / "run")
    assert [m["validation_loss"] for m in run.metrics[4:]] == pytest.approx(OLD_GOES_ON[name], rel=1e-4)
    assert [m["kept_epoch"] for m in run.metrics] == [1, 2, 3, 4, 5, 6]
    assert len({line.count(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()}) == 1


def test_a_run_of_an_older_version_resumes_from_python(tmp_path: Path) -> None:
    shutil.copytree(OLD / "iwae", tmp_path / "run")
    data = pv.load_data(OLD / "table.npy")
    data.source["name"] = "table.npy"
    vae = pv.build("ppca", "linear", data, latent_dim=2, seed=1)
    run = pv.fit(
        vae, data, epochs=6, batch_size=24, compile="off", device="cpu", seed=3, objective="iwae:num_particles=5",
        out=tmp_path / "run", resume=True,
    )  # fmt: skip
    assert run.metrics[-1]["validation_loss"] == pytest.approx(OLD_GOES_ON["iwae"][1], rel=1e-4)


def test_runs_of_an_older_version_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [shutil.copytree(OLD / name, tmp_path / name) for name in OLD_GOES_ON]
    assert command(["compare", *map(str, runs), "--data-root", str(OLD), "--samples", "20", "--quiet"]) == 0
    assert "iwae" in capsys.readouterr().out
