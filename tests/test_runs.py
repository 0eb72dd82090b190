"""Runs: what training leaves in a directory, what loads from it, and how a run that was killed goes on."""

from __future__ import annotations

import json
import pickle
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import digits, small_vae, tensors

import pyro_vae as pv
from pyro_vae.errors import UserError


def test_the_directory_of_a_run(tmp_path: Path) -> None:
    data, out = digits(), tmp_path / "some" / "where"
    run = pv.fit(small_vae(data, "mixture"), data, epochs=2, out=out)
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint.safetensors", "metrics.csv", "metrics.jsonl", "rows.safetensors", "spec.toml", "weights.safetensors",
    ]  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == run.metrics
    assert set(lines[0]) == {
        "epoch", "step", "train_loss", "lr", "seconds", "validation_loss", "validation_reconstruction", "validation_kl",
        "validation_objective", "kept_epoch",
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
    pv.fit(small_vae(data), data, epochs=1, out=tmp_path / "run")
    for path in (tmp_path / "run").iterdir():
        with pytest.raises((pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError)):
            pickle.loads(path.read_bytes())
        assert not path.read_bytes().startswith(b"PK")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pickle was read")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    pv.load(tmp_path / "run")
    pv.fit(small_vae(data), data, epochs=1, out=tmp_path / "run", resume=True)


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")  # guides hardly trained
@pytest.mark.parametrize("model", ["mlp", "mixture", "ppca", "frey"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)])
def test_a_loaded_run_gives_the_same_numbers_to_the_bit(model: str, dtype: torch.dtype, tmp_path: Path) -> None:
    binary = model in ("mlp", "mixture")
    data = digits() if binary else pv.load_data("digits", dequantization="uniform")
    vae = small_vae(data, model).to(dtype)
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
        {"schedule": "cosine", "optimizer": "adamw", "clip_norm": 1.0, "skip_gradients": 60.0},
        {"schedule": "constant", "optimizer": "sgd", "average": None, "lr": 0.01},
        {"optimizer": "rmsprop", "objective": "analytic-elbo:beta=2.0,warmup_steps=30", "patience": 9},
    ],
    ids=["default", "cosine adamw", "constant sgd", "rmsprop warm-up"],
)
def test_a_resumed_run_equals_one_left_alone(settings: dict[str, Any], tmp_path: Path) -> None:
    data = digits()
    whole = pv.fit(small_vae(data), data, epochs=4, out=tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        pv.fit(small_vae(data), data, epochs=4, out=tmp_path / "killed", callback=killed_after(2), **settings)
    assert len(pv.load(tmp_path / "killed").metrics) == 2
    resumed = pv.fit(small_vae(data, seed=5), data, epochs=4, out=tmp_path / "killed", resume=True, **settings)
    for name in ("weights.safetensors", "checkpoint.safetensors"):
        a, b = tensors(tmp_path / "whole" / name), tensors(tmp_path / "killed" / name)
        assert set(a) == set(b)
        assert all(torch.equal(a[n], b[n]) for n in a), name
    timeless = lambda run: [{k: v for k, v in m.items() if k != "seconds"} for m in run.metrics]  # noqa: E731
    assert timeless(resumed) == timeless(whole)
    assert all(torch.equal(t, resumed.program.state_dict()[n]) for n, t in whole.program.state_dict().items())
    again = pv.fit(small_vae(data), data, epochs=4, out=tmp_path / "killed", resume=True, **settings)
    assert timeless(again) == timeless(whole)  # nothing left to do


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    data, out = digits(), tmp_path / "run"
    pv.fit(small_vae(data), data, epochs=1, out=out)
    for change, message in (
        ({"lr": 0.1}, r"training\.lr was 0\.002 and is now 0\.1"),
        ({"batch_size": 64}, r"training\.batch_size was 128 and is now 64"),
    ):
        with pytest.raises(UserError, match=message):
            pv.fit(small_vae(data), data, **{"epochs": 1, **change}, out=out, resume=True)
    with pytest.raises(UserError, match=r"model\.latent_dim was 3 and is now 4"):
        pv.fit(small_vae(data, latent_dim=4), data, epochs=1, out=out, resume=True)
    with pytest.raises(UserError, match="no run directory"):
        pv.fit(small_vae(data), data, epochs=1, out=tmp_path / "other", resume=True)
    with pytest.raises(UserError, match="already holds a run"):
        pv.fit(small_vae(data), data, epochs=1, out=out)


def test_a_run_killed_in_its_first_epoch_begins_again(tmp_path: Path) -> None:
    data, out = digits(), tmp_path / "run"
    whole = pv.fit(small_vae(data), data, epochs=2)
    pv.fit(small_vae(data), data, epochs=2, out=out)
    for name in ("checkpoint.safetensors", "weights.safetensors", "metrics.jsonl"):
        (out / name).unlink()
    resumed = pv.fit(small_vae(data), data, epochs=2, out=out, resume=True)
    assert all(torch.equal(t, resumed.program.state_dict()[n]) for n, t in whole.program.state_dict().items())


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path: Path) -> None:
    from pyro_vae.training.run import claimed

    pytest.importorskip("fcntl")
    data, path = digits(), tmp_path / "new" / "run"
    with claimed(path):
        with pytest.raises(UserError, match="is being trained by another process"):
            pv.fit(small_vae(data), data, epochs=1, out=path)
        assert path.is_dir()
    assert not path.parent.exists()  # nothing came into it
    pv.fit(small_vae(data), data, epochs=2, out=path)
    with claimed(path), pytest.raises(UserError, match="is being trained by another process"):
        pv.fit(small_vae(data), data, epochs=2, out=path, resume=True)
    assert len(pv.fit(small_vae(data), data, epochs=2, out=path, resume=True).metrics) == 2
