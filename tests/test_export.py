"""Encoder and decoder as torch.export programs, and the metrics of a run in other programs' formats."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from small import digits, small_vae

import pyro_vae as pv
from pyro_vae.cli.app import run as command
from pyro_vae.evaluation.export import noise_of
from pyro_vae.seeding import generator, seeded


@pytest.mark.parametrize(
    "overrides", [{}, {"prior": "vamp:components=5"}, pytest.param({"likelihood": "normal"}, marks=pytest.mark.slow)]
)
def test_what_is_exported_computes_what_the_program_does(overrides: dict[str, Any], tmp_path: Path) -> None:
    vae = small_vae((1, 4, 4), **overrides)
    exported = pv.export(vae, tmp_path)
    assert set(exported) == {"encoder", "decoder"}
    for rows in (1, 7):
        x = torch.rand(rows, 1, 4, 4, generator=generator(0)).round()
        encoder, decoder = (torch.export.load(tmp_path / f"{part}.pt2").module() for part in ("encoder", "decoder"))
        z = encoder(x)
        torch.testing.assert_close(z["z"], pv.encode(vae, x))
        torch.testing.assert_close(decoder(z), pv.decode(vae, z["z"]))


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["diagonal", "coupling"])
def test_an_exported_density_is_the_score(guide: str, tmp_path: Path) -> None:
    """log p(x) of the graph, given the noise that pv.score draws, to 1e-5 relative, for other numbers of rows too."""
    vae = pv.build("mlp", guide, (1, 4, 4), latent_dim=3, encoder="mlp:hidden=[16]", decoder="mlp:hidden=[16]")
    exported = pv.export(vae, tmp_path, parts=["density"], num_samples=20)
    assert exported["density"].graph_signature.user_outputs == ("log_likelihood", "elbo")
    density = torch.export.load(tmp_path / "density.pt2").module()
    for rows in (1, 7):
        x = torch.rand(rows, 1, 4, 4, generator=generator(rows)).round()
        found = density(x, noise_of(vae, x, num_samples=20))
        scores = pv.score(vae, x, num_samples=20, warn=False)
        torch.testing.assert_close(found["log_likelihood"], scores.log_likelihood, rtol=1e-5, atol=0)
        torch.testing.assert_close(found["elbo"], scores.result.elbo, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_onnx_scores_as_python_does(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    vae, x = small_vae((1, 4, 4)), torch.rand(7, 1, 4, 4, generator=generator(0)).round()
    pv.export(vae, tmp_path, parts=["posterior", "density"], num_samples=20, onnx=True)
    session = runtime.InferenceSession(tmp_path / "density.onnx")
    assert [o.name for o in session.get_outputs()] == ["log_likelihood", "elbo"]
    names = [i.name for i in session.get_inputs()]
    given = [x.numpy(), *(n.numpy() for n in noise_of(vae, x, num_samples=20))]
    found = session.run(None, dict(zip(names, given, strict=True)))[0]
    scores = pv.score(vae, x, num_samples=20, warn=False).log_likelihood
    torch.testing.assert_close(torch.from_numpy(found), scores, rtol=1e-5, atol=0)


def test_onnx_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(pv.UserError, match="pip install onnx onnxscript"):
        pv.export(small_vae((1, 4, 4)), tmp_path, onnx=True)
    assert not list(tmp_path.iterdir())


def test_outputs_are_called_as_what_they_are() -> None:
    vae = small_vae((1, 4, 4))
    exported = pv.export(vae, parts=["encoder", "decoder", "posterior"])
    named = {part: one.graph_signature.user_outputs for part, one in exported.items()}
    assert named == {"encoder": ("z",), "decoder": ("mean",), "posterior": ("z_mean", "z_scale")}
    x = torch.rand(5, 1, 4, 4, generator=generator(0)).round()
    found = exported["posterior"].module()(x)
    torch.testing.assert_close(found["z_mean"], pv.encode(vae, x))
    assert found["z_scale"].shape == (5, 3)
    assert bool((found["z_scale"] > 0).all())
    with pytest.raises(pv.UserError, match=r"draws by .*, and only normal and uniform numbers can be an input"):
        pv.export(pv.build("binary-latents", "score-bernoulli", (1, 4, 4), latent_dim=3), parts=["density"])


def test_what_torch_compile_wraps_loads_again(tmp_path: Path) -> None:
    """Names in files are those of the module inside, so that runs load into either, and a declared program from its record."""
    x = torch.rand(40, 5, generator=generator(1))
    with seeded(0):
        linear = [torch.nn.Linear(5, 6) for _ in range(2)]
    wrapped = torch.compile(small_vae((5,), "ppca"))
    pv.fit(wrapped, x, epochs=1, compile="off", out=tmp_path / "whole")
    torch.testing.assert_close(pv.load(tmp_path / "whole").program.state_dict(), wrapped._orig_mod.state_dict())
    again = torch.compile(small_vae((5,), "ppca"))
    assert pv.load(tmp_path / "whole", program=again).program is again
    part = pv.build("ppca", "linear", (5,), latent_dim=3, encoder=torch.compile(linear[0], backend="eager"))
    pv.fit(part, x, epochs=1, compile="off", out=tmp_path / "part")
    plain = pv.build("ppca", "linear", (5,), latent_dim=3, encoder=linear[1])
    assert pv.encode(pv.load(tmp_path / "part", program=plain).program, x).shape == (40, 3)


class Conditional(torch.nn.Module):
    """p(z) p(x | z, y)."""

    event_shape = (5,)

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(8, 2), torch.nn.Linear(5, 5)

    def model(self, x: torch.Tensor, y: torch.Tensor) -> None:
        pyro.module("program", self)
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
            both = torch.cat([z, y.expand(*z.shape[:-1], 3)], -1)
            pyro.sample("x", dist.Normal(self.decoder(both), 1).to_event(1), obs=x)

    def guide(self, x: torch.Tensor, y: torch.Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Normal(self.encoder(torch.cat([x, y], -1)), 1).to_event(1))


def test_a_conditional_program_takes_y_too() -> None:
    with seeded(0):
        program, x, y = Conditional(), torch.rand(4, 5), torch.eye(4)[:, :3]
    exported = pv.export(program, y=torch.eye(3))
    z = exported["encoder"].module()(x, y)
    torch.testing.assert_close(z["z"], pv.encode(program, x, y))
    torch.testing.assert_close(exported["decoder"].module()(z, y), pv.decode(program, z["z"], y))
    with pytest.raises(pv.UserError, match="is conditional"):
        pv.export(program)


def test_what_cannot_be_exported_is_said() -> None:
    flow = small_vae((1, 4, 4), posterior="autoregressive-flow:layers=1,hidden=[8]")
    with pytest.raises(pv.UserError, match="the encoder has no mean in closed form"):
        pv.export(flow)
    assert set(pv.export(flow, parts=["decoder"])) == {"decoder"}
    with pytest.raises(pv.UserError, match="unknown part 'encode'"):
        pv.export(flow, parts=["encode"])


def test_from_the_command_line_with_metrics_for_spreadsheets(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--set", "latent_dim=2", "--encoder", "mlp:hidden=[8]", "--decoder", "mlp:hidden=[8]", "--quiet"]
    assert command(["train", "digits", *small, "--epochs", "3", "--out", "run"]) == 0
    capsys.readouterr()
    assert command(["export", "run"]) == 0
    assert capsys.readouterr().out.split() == ["run/export/encoder.pt2", "run/export/decoder.pt2"]
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    with Path("run/metrics.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert rows == lines


def test_scalars_for_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    small = ["--set", "latent_dim=2", "--encoder", "mlp:hidden=[8]", "--decoder", "mlp:hidden=[8]", "--quiet"]
    assert command(["train", "digits", *small, "--epochs", "3", "--out", str(out), "--tensorboard"]) == 0
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    losses = [json.loads(line)["train_loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [e.value for e in events.Scalars("train_loss")] == pytest.approx(losses, rel=1e-5)
    assert pv.load(out).metrics[-1]["epoch"] == 3


def test_without_tensorboard_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert command(["train", "digits", "--epochs", "1", "--out", str(tmp_path / "run"), "--tensorboard"]) == 2
    assert "TensorBoard is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_digits_can_be_exported_after_training() -> None:
    data = digits()
    vae = small_vae(data)
    pv.fit(vae, data, epochs=1)
    x = data.observed("test")
    torch.testing.assert_close(pv.export(vae)["encoder"].module()(x)["z"], pv.encode(vae, x))
