"""Training: what is minimised falls, the best weights are kept, and every setting does what it says."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from small import digits, small_vae, tensors
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.errors import NumericalError, UserError
from pyro_vae.programs.trace import draw_terms, evaluating
from pyro_vae.seeding import derive_seed, generator, seeded
from pyro_vae.training import selection, source
from pyro_vae.training.schedule import share_of_newest
from pyro_vae.training.skipping import advance


def noise(folder: Path) -> pv.Data:
    """Forty rows of coin flips: what is learned of them is learned by heart, and validation soon gets worse."""
    np.save(folder / "noise.npy", np.random.default_rng(0).random((40, 20)) < 0.5)
    return pv.load_data(folder / "noise.npy")


LEARN_BY_HEART: dict[str, Any] = {"lr": 0.02, "batch_size": 8, "schedule": "constant", "average": None}


def rows(n: int = 64) -> Tensor:
    return torch.rand(n, 5, generator=generator(2)).round()


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
    vae = small_vae(data)
    states, callback = states_by_epoch(vae)
    run = pv.fit(vae, data, epochs=60, **LEARN_BY_HEART, callback=callback)
    losses = [m["validation_loss"] for m in run.metrics]
    best = losses.index(min(losses))
    assert best < len(losses) - 1, "the test needs a run whose last epoch is not its best"
    assert all(torch.equal(t, states[best][n]) for n, t in vae.state_dict().items())
    with evaluating(vae), seeded(derive_seed("validation")):
        terms = draw_terms(vae, data.observed("validation"), num_samples=1)
    assert -float(terms.log_weight.mean()) == pytest.approx(losses[best], rel=1e-5)


@pytest.mark.parametrize("binarization", ["dynamic", "threshold"])
def test_a_large_validation_split_is_read_in_blocks(monkeypatch: pytest.MonkeyPatch, binarization: str) -> None:
    data = digits().with_(binarization=binarization)
    monkeypatch.setattr(selection, "VALIDATION_ROWS", 50)
    whole = pv.fit(small_vae(data), data, steps=3, seed=1).metrics
    monkeypatch.setattr(source, "OBSERVED_BYTES", 0)
    split = source.make_source(data, False, torch.device("cpu"), torch.float32).validation()
    assert split is not None
    assert isinstance(split[0], source.Observed)
    assert len(split[0]) == len(data.validation)
    assert torch.equal(split[0][10:20], data.observed("validation")[10:20])
    in_blocks = pv.fit(small_vae(data), data, steps=3, seed=1).metrics
    assert in_blocks[0]["validation_loss"] == whole[0]["validation_loss"]


@pytest.mark.parametrize("ahead", [0, 3000, 2**20])
def test_minibatches_gathered_together_are_those_gathered_one_by_one(
    ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "AHEAD_BYTES", ahead)
    x = torch.arange(103.0).repeat_interleave(8).reshape(103, 8)
    order = torch.randperm(103, generator=torch.Generator().manual_seed(0))
    found = list(source.make_source(x, False, torch.device("cpu"), torch.float32).minibatches(order, 10))
    assert [len(rows) for rows, _ in found] == [10] * 10 + [3]
    assert torch.equal(torch.cat([rows for rows, _ in found]), x[order])


def test_early_stopping(tmp_path: Path) -> None:
    data = noise(tmp_path)
    run = pv.fit(small_vae(data), data, epochs=200, **LEARN_BY_HEART, patience=3)
    losses = [m["validation_loss"] for m in run.metrics]
    assert len(losses) < 200
    assert losses.index(min(losses)) == len(losses) - 4


def test_steps_and_epochs() -> None:
    x = rows(64)
    metrics = pv.fit(small_vae(x), x, epochs=3, batch_size=16).metrics
    assert [(m["epoch"], m["step"]) for m in metrics] == [(1, 4), (2, 8), (3, 12)]
    metrics = pv.fit(small_vae(x), x, steps=10, batch_size=16).metrics
    assert [(m["epoch"], m["step"]) for m in metrics] == [(1, 4), (2, 8), (3, 10)]
    metrics = pv.fit(small_vae(x), x, epochs=1, batch_size=1000).metrics
    assert metrics[0]["step"] == 1
    metrics = pv.fit(small_vae(x), x, epochs=1, batch_size=60).metrics  # four rows wait for the next shuffle
    assert metrics[0]["step"] == 1
    training = pv.fit(small_vae(x), x, steps=1).record["training"]
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
    weights = [pv.fit(small_vae(x), d, epochs=2, batch_size=16).program.state_dict() for d in datasets]
    for other in weights[1:]:
        assert all(torch.equal(t, other[n]) for n, t in weights[0].items())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(5), r"a lone datum of shape \(5,\)"),
        (torch.zeros(0, 5), "at least one row"),
        ([[0.0, 1.0]], r"got \(1, 2\)"),
        (torch.full((9, 5), math.nan), "NaN or infinite"),
        (torch.full((9, 5), math.inf), "NaN or infinite"),
        (torch.full((9, 5), 0.25), "0.25"),
        (torch.zeros(9, 4), r"got \(9, 4\)"),
        (torch.cat([torch.zeros(1500, 5), torch.full((1, 5), 0.5)]), "0.5"),
    ],
)
def test_data_that_cannot_be_trained_on(data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        pv.fit(small_vae((5,)), data, epochs=1, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_weight_averaging_is_the_moving_average() -> None:
    x = rows()
    vae = small_vae(x)
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


def test_the_average_waits_a_small_part_of_its_memory() -> None:
    """One update for several steps decays as they would have one by one."""
    steps, decay = 30_000, 0.999
    shares = [share_of_newest(decay, step) for step in range(1, steps + 1)]
    assert all(shares[:800])
    for start in (0, 2000, 20_000):
        kept = math.prod(1 - s for s in shares[start : start + 1000])
        one_by_one = math.prod(min(decay, (1 + s) / (10 + s)) for s in range(start + 1, start + 1001))
        assert kept == pytest.approx(one_by_one, rel=0.03, abs=1e-12)
    assert max(map(len, bytes(map(bool, shares)).split(b"\1"))) == 15  # zeros between updates
    assert share_of_newest(0.9, 10**6) == pytest.approx(0.1)
    assert share_of_newest(None, 1) == 0.0


def test_schedules() -> None:
    x, lr, n = rows(), 0.01, 20
    rates = {
        kind: [m["lr"] for m in pv.fit(small_vae(x), x, epochs=n, batch_size=64, lr=lr, schedule=kind).metrics]
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
    vae = small_vae(x)
    before = torch.cat([p.detach().flatten().clone() for p in vae.parameters()])
    pv.fit(vae, x, steps=1, optimizer="sgd", lr=1.0, schedule="constant", clip_norm=1e-3, average=None)
    after = torch.cat([p.detach().flatten() for p in vae.parameters()])
    assert float((after - before).norm()) == pytest.approx(1e-3, rel=1e-2)


def test_a_step_whose_gradient_explodes_is_left_out() -> None:
    """One row is a million times too large: its steps change nothing and are counted; a threshold that all keep is none."""
    x = torch.randn(64, 5, generator=generator(0))
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 8, "standardize": "off", "average": None}
    plain, kept = (small_vae(x, "ppca", seed=1) for _ in range(2))
    pv.fit(plain, x, **settings)
    assert [m["skipped"] for m in pv.fit(kept, x, skip_gradients=1e9, **settings).metrics] == [0, 0, 0]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), kept.parameters(), strict=True))
    x[3] *= 1e6
    assert [m["skipped"] for m in pv.fit(kept, x, skip_gradients=1e6, **settings).metrics] == [1, 1, 1]
    before = [p.detach().clone() for p in kept.parameters()]
    run = pv.fit(kept, x, skip_gradients=1e-9, **settings)
    assert [m["skipped"] for m in run.metrics] == [8, 8, 8]
    assert all(torch.equal(a, b) for a, b in zip(before, kept.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adamax", "rmsprop", "adagrad", "sgd"])
def test_every_optimizer_trains(optimizer: str) -> None:
    x = rows()
    lr = 0.05 if optimizer in ("sgd", "adagrad") else 0.01
    metrics = pv.fit(small_vae(x), x, epochs=30, batch_size=16, lr=lr, optimizer=optimizer).metrics
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"]


def test_a_callback_may_stop() -> None:
    x = rows()
    seen: list[dict[str, Any]] = []

    def callback(metrics: dict[str, Any]) -> bool:
        seen.append(metrics)
        return len(seen) == 2

    run = pv.fit(small_vae(x), x, epochs=10, callback=callback)
    assert run.metrics == seen
    assert len(seen) == 2


def test_a_loss_that_is_no_number_is_told(tmp_path: Path) -> None:
    x = torch.randn(64, 5, generator=generator(0))
    with pytest.raises(NumericalError, match=r"NaN or infinite at step \d+.*lower lr, set clip_norm"):
        pv.fit(small_vae(x, "ppca"), x, epochs=9, optimizer="sgd", lr=1e20, out=tmp_path / "run")

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


@pytest.mark.parametrize(("share", "checkpoints"), [(math.inf, [0, 1, 2, 3, 4]), (1e-9, [0, 1, 4])])
def test_checkpoints_are_rarer_where_epochs_are_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, checkpoints: list[int]
) -> None:
    from pyro_vae.training import due, fit, loop

    made: list[int] = []

    def save_checkpoint(path: Path, trainer: Any, within: Any = None) -> None:
        made.append(trainer.epoch)
        save(path, trainer, within)

    save = loop.save_checkpoint
    monkeypatch.setattr(due, "SHARE", share)
    for module in (loop, fit):
        monkeypatch.setattr(module, "save_checkpoint", save_checkpoint)
    data = digits()
    run = pv.fit(small_vae(data), data, epochs=4, out=tmp_path / "run")
    assert made == checkpoints
    kept = tensors(tmp_path / "run" / "weights.safetensors")
    assert all(torch.equal(kept[n], t) for n, t in run.program.state_dict().items())
    made.clear()
    pv.fit(small_vae(data), data, epochs=4, out=tmp_path / "other", callback=lambda metrics: metrics["epoch"] == 3)
    assert made == [0, 1, 2, 3]  # who is called after an epoch finds its checkpoint


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
        ({"optimizer": "adm"}, "unknown optimizer 'adm': did you mean 'adam'"),
        ({"schedule": "linear"}, "unknown schedule 'linear': choose from"),
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
        pv.fit(small_vae((5,)), rows(), **settings)
    assert "\n" not in str(caught.value)


def test_nothing_to_train() -> None:
    with pytest.raises(UserError, match="nothing to train"):
        pv.fit(small_vae((5,)).requires_grad_(False), rows(), epochs=1)


def test_a_density_on_levels_is_warned_of() -> None:
    data = pv.load_data("digits", binarization="none")
    with pytest.warns(UserWarning, match='dequantization="uniform"'):
        pv.fit(small_vae(data, "ppca"), data, steps=1)


def test_training_depends_on_its_seeds_alone() -> None:
    data = digits()

    def weights(build_seed: int, seed: int) -> Tensor:
        run = pv.fit(small_vae(data, seed=build_seed), data, steps=12, seed=seed)
        return torch.cat([t.flatten() for t in run.program.state_dict().values()])

    reference = weights(0, 0)
    assert torch.equal(weights(0, 0), reference)
    assert not torch.equal(weights(0, 1), reference)
    assert not torch.equal(weights(1, 0), reference)


@pytest.mark.parametrize("total", [2, 4, 5, 37, 1000])
@pytest.mark.parametrize("name", ["one-cycle", "cosine", "constant"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_schedules_are_torchs(name: str, optimizer: str, total: int) -> None:
    from pyro_vae.training.optimizers import make_optimizer
    from pyro_vae.training.schedule import Schedule
    from pyro_vae.training.settings import Settings

    settings = Settings(lr=0.01, schedule=name, optimizer=optimizer)
    theirs = make_optimizer(settings.optimizer, settings.lr, [torch.nn.Parameter(torch.zeros(1))])
    momentum = optimizer == "adam"
    scheduler: Any = torch.optim.lr_scheduler.ConstantLR(theirs, factor=1.0, total_iters=1)
    if name == "one-cycle" and total > 3:
        scheduler = torch.optim.lr_scheduler.OneCycleLR(theirs, 0.01, total_steps=total + 1, cycle_momentum=momentum)
    if name == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, total)
    ours = make_optimizer(settings.optimizer, settings.lr, [torch.nn.Parameter(torch.zeros(1))])
    for step in range(total):
        Schedule(settings, total).apply(ours, step)
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9, abs=1e-15)
        if momentum:
            assert ours.param_groups[0]["betas"] == pytest.approx(theirs.param_groups[0]["betas"], rel=1e-9)
        theirs.step()
        scheduler.step()


def test_a_first_step_that_is_left_out_is_counted() -> None:
    """As in a compiled step: Adam's moments of what comes after were corrected for one step fewer."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p], lr=0.1)
    p.grad = torch.full((3,), 1e9)
    advance(optimizer, taken=False)
    assert torch.equal(p, torch.ones(3))
    assert float(optimizer.state[p]["step"]) == 1
    assert not optimizer.state[p]["exp_avg"].any()
    assert optimizer.param_groups[0]["lr"] == 0.1
