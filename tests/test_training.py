"""Training: what is minimised falls, the best is kept, and a run that was killed goes on to the same bits."""

from __future__ import annotations

import json
import math
import pickle
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.errors import NumericalError, UserError
from pyro_vae.programs.contract import draw_terms, evaluating
from pyro_vae.seeding import derive_seed, generator, seeded
from pyro_vae.training.loop import VALIDATION
from pyro_vae.training.settings import OPTIMIZERS

SMALL: dict[str, Any] = {
    "latent_dim": 3,
    "encoder": {"name": "mlp", "hidden": [16]},
    "decoder": {"name": "mlp", "hidden": [16]},
}


def digits() -> pv.Data:
    return pv.load_data("digits")


def small(data: Any, model: str = "mlp", **overrides: Any) -> Any:
    return pv.build(model, "diagonal", data, **{**SMALL, **overrides})


def noise(folder: Path) -> pv.Data:
    """Forty rows of coin flips: what is learned of them is learned by heart, and validation soon gets worse."""
    np.save(folder / "noise.npy", np.random.default_rng(0).random((40, 20)) < 0.5)
    return pv.load_data(folder / "noise.npy")


LEARN_BY_HEART: dict[str, Any] = {"lr": 0.02, "batch_size": 8, "schedule": "constant", "average": None}


def rows(n: int = 64) -> Tensor:
    return torch.rand(n, 5, generator=generator(2)).round()


def tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def states_by_epoch(program: nn.Module) -> tuple[list[dict[str, Tensor]], Callable[[dict[str, Any]], None]]:
    found: list[dict[str, Tensor]] = []
    return found, lambda metrics: found.append({n: t.clone() for n, t in program.state_dict().items()})


def test_the_loss_falls_on_digits() -> None:
    data = digits()
    vae = pv.build("mlp", "diagonal", data, latent_dim=10, encoder="mlp:hidden=[100]", decoder="mlp:hidden=[100]")
    run = pv.fit(vae, data, epochs=12, batch_size=64, lr=0.005)
    losses = [m["train_loss"] for m in run.metrics]
    assert losses[0] > losses[2] > losses[-1]
    assert losses[-1] < losses[0] - 2
    assert run.metrics[-1]["validation_loss"] < run.metrics[0]["validation_loss"] - 2
    for m in run.metrics:
        assert m["validation_loss"] == pytest.approx(m["validation_kl"] - m["validation_reconstruction"])


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    data = noise(tmp_path)
    vae = small(data)
    states, callback = states_by_epoch(vae)
    run = pv.fit(vae, data, epochs=60, **LEARN_BY_HEART, callback=callback)
    losses = [m["validation_loss"] for m in run.metrics]
    best = losses.index(min(losses))
    assert best < len(losses) - 1, "the test needs a run whose last epoch is not its best"
    assert all(torch.equal(t, states[best][n]) for n, t in vae.state_dict().items())
    with evaluating(vae), seeded(derive_seed(0, VALIDATION)):
        terms = draw_terms(vae, data.observed("validation"), num_samples=1)
    assert -float(terms.log_weight.mean()) == pytest.approx(losses[best], rel=1e-5)


def test_early_stopping(tmp_path: Path) -> None:
    data = noise(tmp_path)
    run = pv.fit(small(data), data, epochs=200, **LEARN_BY_HEART, patience=3)
    losses = [m["validation_loss"] for m in run.metrics]
    assert len(losses) < 200
    assert losses.index(min(losses)) == len(losses) - 4
    # nothing to wait for without a validation split
    assert len(pv.fit(small((5,)), rows(), epochs=4, patience=1).metrics) == 4


def test_steps_and_epochs() -> None:
    x = rows(64)
    metrics = pv.fit(small(x), x, epochs=3, batch_size=16).metrics
    assert [(m["epoch"], m["step"]) for m in metrics] == [(1, 4), (2, 8), (3, 12)]
    metrics = pv.fit(small(x), x, steps=10, batch_size=16).metrics
    assert [(m["epoch"], m["step"]) for m in metrics] == [(1, 4), (2, 8), (3, 10)]
    metrics = pv.fit(small(x), x, epochs=1, batch_size=1000).metrics
    assert metrics[0]["step"] == 1
    metrics = pv.fit(small(x), x, epochs=1, batch_size=60).metrics  # four rows wait for the next shuffle
    assert metrics[0]["step"] == 1
    training = pv.fit(small(x), x, steps=1).record["training"]
    assert training["steps"] == 1
    assert "epochs" not in training


class Pairs(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Items (x, label) of a tensor."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], index % 3


def test_a_tensor_and_a_dataset_of_its_rows_train_alike() -> None:
    x = rows()
    datasets = [x, torch.utils.data.TensorDataset(x), Pairs(x)]
    weights = [pv.fit(small(x), d, epochs=2, batch_size=16).program.state_dict() for d in datasets]
    for other in weights[1:]:
        assert all(torch.equal(t, other[n]) for n, t in weights[0].items())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(5), r"tensor of shape \(5,\)"),
        (torch.zeros(0, 5), "no rows"),
        ([[0.0, 1.0]], "got list"),
        (torch.full((9, 5), math.nan), "NaN or infinite"),
        (torch.full((9, 5), math.inf), "NaN or infinite"),
        (torch.full((9, 5), 0.25), "0.25"),
        (torch.zeros(9, 4), r"shape \(4,\)"),
        (torch.cat([torch.zeros(1500, 5), torch.full((1, 5), 0.5)]), "0.5"),
    ],
)
def test_data_that_cannot_be_trained_on(data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        pv.fit(small((5,)), data, epochs=1, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_weight_averaging_is_the_moving_average() -> None:
    x = rows()
    vae = small(x)
    start = {n: t.clone() for n, t in vae.state_dict().items()}
    states, callback = states_by_epoch(vae)
    decay = 0.7
    pv.fit(vae, x, epochs=8, batch_size=64, average=decay, callback=callback)  # one step per epoch
    average = start
    for step, state in enumerate(states, 1):
        d = min(decay, (1 + step) / (10 + step))
        average = {n: d * average[n] + (1 - d) * t for n, t in state.items()}
    for n, t in vae.state_dict().items():
        torch.testing.assert_close(t, average[n], rtol=1e-5, atol=1e-6)
        assert not torch.equal(t, states[-1][n])


def test_schedules() -> None:
    x, lr, n = rows(), 0.01, 20
    rates = {
        kind: [m["lr"] for m in pv.fit(small(x), x, epochs=n, batch_size=64, lr=lr, schedule=kind).metrics]
        for kind in ("constant", "cosine", "one-cycle")
    }
    assert rates["constant"] == [lr] * n
    assert rates["cosine"] == pytest.approx([lr / 2 * (1 + math.cos(math.pi * t / n)) for t in range(n)])
    cycle = rates["one-cycle"]
    peak = cycle.index(max(cycle))
    assert cycle[0] == pytest.approx(lr / 25)
    assert max(cycle) == pytest.approx(lr, rel=0.05)
    assert abs(peak - 0.3 * n) <= 1
    assert cycle[: peak + 1] == sorted(cycle[: peak + 1])
    assert cycle[peak:] == sorted(cycle[peak:], reverse=True)
    assert 0 < cycle[-1] < lr / 20


def test_clipping_bounds_the_step() -> None:
    x = rows()
    vae = small(x)
    before = torch.cat([p.detach().flatten().clone() for p in vae.parameters()])
    pv.fit(vae, x, steps=1, optimizer="sgd", lr=1.0, schedule="constant", clip_norm=1e-3, average=None)
    after = torch.cat([p.detach().flatten() for p in vae.parameters()])
    assert float((after - before).norm()) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains(optimizer: str) -> None:
    x = rows()
    lr = 0.05 if optimizer in ("sgd", "adagrad") else 0.01
    metrics = pv.fit(small(x), x, epochs=30, batch_size=16, lr=lr, optimizer=optimizer).metrics
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"]


def test_a_callback_may_stop() -> None:
    x = rows()
    seen: list[dict[str, Any]] = []

    def callback(metrics: dict[str, Any]) -> bool:
        seen.append(metrics)
        return len(seen) == 2

    run = pv.fit(small(x), x, epochs=10, callback=callback)
    assert run.metrics == seen
    assert len(seen) == 2


def test_a_loss_that_is_no_number_is_told(tmp_path: Path) -> None:
    x = torch.randn(64, 5, generator=generator(0))
    with pytest.raises(NumericalError, match=r"NaN or infinite by step \d+.*lower lr, set clip_norm"):
        pv.fit(small(x, "ppca"), x, epochs=9, optimizer="sgd", lr=1e20, out=tmp_path / "run")

    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.passes = 0

        def model(self, x: Tensor) -> None:
            self.passes += 1
            scale = self.scale * (math.nan if self.passes > 40 else 1.0)
            with pyro.plate("data", x.shape[0], dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(5), 1.0, validate_args=False).to_event(1))
                pyro.sample("x", dist.Normal(z, scale, validate_args=False).to_event(1), obs=x)

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", x.shape[0], dim=-1):
                pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    with pytest.raises(NumericalError, match=r"checkpoint in .*late is from epoch \d"):
        pv.fit(Breaks(), x, epochs=20, batch_size=8, out=tmp_path / "late")
    kept = tensors(tmp_path / "late" / "checkpoint.safetensors")
    assert all(torch.isfinite(t).all() for t in kept.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs = 0"),
        ({"steps": 0}, "steps = 0"),
        ({"epochs": 1, "steps": 1}, "epochs or steps, not both"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"lr": 0.0}, "lr = 0.0"),
        ({"lr": math.nan}, "lr = nan"),
        ({"average": 1.0}, "average = 1.0"),
        ({"patience": 0}, "patience = 0"),
        ({"optimizer": "adm"}, "optimizer = 'adm'"),
        ({"schedule": "linear"}, "schedule = 'linear'"),
        ({"learning_rate": 0.1}, "learning_rate"),
        ({"batchsize": 3}, "did you mean 'batch_size'"),
        ({"seed": -1}, "seed = -1"),
        ({"objective": "elbow"}, "did you mean 'elbo'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"resume": True}, "resume needs out"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        pv.fit(small((5,)), rows(), **settings)
    assert "\n" not in str(caught.value)


def test_nothing_to_train() -> None:
    with pytest.raises(UserError, match="nothing to train"):
        pv.fit(small((5,)).requires_grad_(False), rows(), epochs=1)


def test_a_density_on_levels_is_warned_of() -> None:
    data = pv.load_data("digits", binarization="none")
    with pytest.warns(UserWarning, match='dequantization="uniform"'):
        pv.fit(small(data, "ppca"), data, steps=1)


# Runs


def test_the_directory_of_a_run(tmp_path: Path) -> None:
    data, out = digits(), tmp_path / "some" / "where"
    run = pv.fit(small(data, "mixture"), data, epochs=2, out=out)
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint.safetensors", "metrics.jsonl", "rows.safetensors", "spec.toml", "weights.safetensors",
    ]  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == run.metrics
    assert set(lines[0]) == {
        "epoch", "step", "train_loss", "lr", "seconds", "validation_loss", "validation_reconstruction", "validation_kl",
    }  # fmt: skip
    record = tomllib.loads((out / "spec.toml").read_text())
    assert record == run.record
    assert {"program", "model", "guide", "data", "training", "versions"} <= set(record)
    assert {"python", "torch", "pyro-ppl", "numpy"} <= set(record["versions"])
    kept = tensors(out / "rows.safetensors")
    assert torch.cat([kept[s] for s in ("train", "validation", "test")]).sort().values.equal(torch.arange(1797))
    weights = tensors(out / "weights.safetensors")
    assert all(torch.equal(t, weights[n]) for n, t in run.program.state_dict().items())


def test_nothing_in_a_run_is_a_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = digits()
    pv.fit(small(data), data, epochs=1, out=tmp_path / "run")
    for path in (tmp_path / "run").iterdir():
        with pytest.raises((pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError)):
            pickle.loads(path.read_bytes())
        assert not path.read_bytes().startswith(b"PK")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pickle was read")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    pv.load(tmp_path / "run")
    pv.fit(small(data), data, epochs=1, out=tmp_path / "run", resume=True)


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")  # guides hardly trained
@pytest.mark.parametrize("model", ["mlp", "mixture", "ppca", "frey"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loaded_run_gives_the_same_numbers_to_the_bit(model: str, dtype: torch.dtype, tmp_path: Path) -> None:
    binary = model in ("mlp", "mixture")
    data = digits() if binary else pv.load_data("digits", dequantization="uniform")
    vae = small(data, model).to(dtype)
    run = pv.fit(vae, data, steps=12, out=tmp_path / "run")
    loaded = pv.load(tmp_path / "run")
    assert loaded.program is not vae
    assert loaded.record == run.record
    assert loaded.metrics == run.metrics
    assert loaded.spec == run.spec == vae.spec
    assert {p.dtype for p in loaded.program.parameters()} == {dtype}
    x = data.observed("test")[:20]
    mine, its = (pv.log_likelihood(p, x, num_samples=50) for p in (vae, loaded.program))
    assert torch.equal(mine.log_likelihood, its.log_likelihood)
    assert torch.equal(pv.sample(vae, 5), pv.sample(loaded.program, 5))
    assert torch.equal(loaded.load_data().observed("test"), data.observed("test"))


def killed_after(epoch: int) -> Callable[[dict[str, Any]], None]:
    def callback(metrics: dict[str, Any]) -> None:
        if metrics["epoch"] == epoch:
            raise KeyboardInterrupt

    return callback


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"schedule": "cosine", "optimizer": "adamw", "clip_norm": 1.0},
        {"schedule": "constant", "optimizer": "sgd", "average": None, "lr": 0.01},
        {"optimizer": "rmsprop", "objective": "analytic-elbo:beta=2.0,warmup_steps=30", "patience": 9},
    ],
    ids=["default", "cosine adamw", "constant sgd", "rmsprop warm-up"],
)
def test_a_resumed_run_equals_one_left_alone(settings: dict[str, Any], tmp_path: Path) -> None:
    data = digits()
    whole = pv.fit(small(data), data, epochs=4, out=tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        pv.fit(small(data), data, epochs=4, out=tmp_path / "killed", callback=killed_after(2), **settings)
    assert len(pv.load(tmp_path / "killed").metrics) == 2
    resumed = pv.fit(small(data, seed=5), data, epochs=4, out=tmp_path / "killed", resume=True, **settings)
    for name in ("weights.safetensors", "checkpoint.safetensors"):
        a, b = tensors(tmp_path / "whole" / name), tensors(tmp_path / "killed" / name)
        assert set(a) == set(b)
        assert all(torch.equal(a[n], b[n]) for n in a), name
    timeless = lambda run: [{k: v for k, v in m.items() if k != "seconds"} for m in run.metrics]  # noqa: E731
    assert timeless(resumed) == timeless(whole)
    assert all(torch.equal(t, resumed.program.state_dict()[n]) for n, t in whole.program.state_dict().items())
    again = pv.fit(small(data), data, epochs=4, out=tmp_path / "killed", resume=True, **settings)
    assert timeless(again) == timeless(whole)  # nothing left to do


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    data, out = digits(), tmp_path / "run"
    pv.fit(small(data), data, epochs=1, out=out)
    for change, message in (
        ({"lr": 0.1}, r"training\.lr was 0\.002 and is now 0\.1"),
        ({"epochs": 2}, r"training\.epochs was 1 and is now 2"),
    ):
        with pytest.raises(UserError, match=message):
            pv.fit(small(data), data, **{"epochs": 1, **change}, out=out, resume=True)
    with pytest.raises(UserError, match=r"model\.latent_dim was 3 and is now 4"):
        pv.fit(small(data, latent_dim=4), data, epochs=1, out=out, resume=True)
    with pytest.raises(UserError, match="no run directory"):
        pv.fit(small(data), data, epochs=1, out=tmp_path / "other", resume=True)
    with pytest.raises(UserError, match="already holds a run"):
        pv.fit(small(data), data, epochs=1, out=out)


def test_a_run_killed_in_its_first_epoch_begins_again(tmp_path: Path) -> None:
    data, out = digits(), tmp_path / "run"
    whole = pv.fit(small(data), data, epochs=2)
    pv.fit(small(data), data, epochs=2, out=out)
    for name in ("checkpoint.safetensors", "weights.safetensors", "metrics.jsonl"):
        (out / name).unlink()
    resumed = pv.fit(small(data), data, epochs=2, out=out, resume=True)
    assert all(torch.equal(t, resumed.program.state_dict()[n]) for n, t in whole.program.state_dict().items())


def test_training_depends_on_its_seeds_alone() -> None:
    data = digits()

    def weights(build_seed: int, seed: int) -> Tensor:
        run = pv.fit(small(data, seed=build_seed), data, steps=12, seed=seed)
        return torch.cat([t.flatten() for t in run.program.state_dict().values()])

    reference = weights(0, 0)
    assert torch.equal(weights(0, 0), reference)
    assert not torch.equal(weights(0, 1), reference)
    assert not torch.equal(weights(1, 0), reference)
