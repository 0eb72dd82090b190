"""pyro-vae sample, reconstruct, interpolate and manifold: exit status, what is written, what is printed."""

import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pyro_vae as pv
from pyro_vae.cli.app import run
from pyro_vae.programs.file import load_program

COMMANDS = ("sample", "reconstruct", "interpolate", "manifold")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Tiny runs: digits with two and three latents, points, and a tensor of the user's."""
    folder = tmp_path_factory.mktemp("runs")
    small = {"decoder": "mlp:hidden=[8]", "encoder": "mlp:hidden=[8]"}
    digits = pv.load_data("digits")
    for dim, name in ((2, "two"), (3, "three")):
        pv.fit(pv.build("mlp", "diagonal", digits, latent_dim=dim, **small), digits, steps=5, out=folder / name)
    points = pv.load_data("pinwheel")
    vae = pv.build("ppca", "linear", points, latent_dim=2, prior="gaussian-mixture:components=3")
    pv.fit(vae, points, steps=5, out=folder / "points")
    pv.fit(
        pv.build("ppca", "linear", (5,), latent_dim=2),
        torch.linspace(-1, 1, 320).reshape(64, 5),
        steps=5,
        out=folder / "tensor",
    )
    return folder


def opened(path):
    """The pixels of a picture in a file."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def status(capsys, *args):
    """Exit status, standard output and standard error of a command."""
    code = run([str(a) for a in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["two", "points"])
def test_a_picture_is_written_into_the_run_and_named_on_standard_output(runs, capsys, command, name):
    code, out, err = status(capsys, command, runs / name)
    assert (code, err) == (0, "")
    assert out.strip() == str(runs / name / f"{command}.png")
    assert opened(out.strip()).std() > 0


@pytest.mark.parametrize("command", COMMANDS)
def test_options_change_the_picture(runs, capsys, tmp_path, command):
    options = {
        "sample": ["--num", 9, "--draws", "--seed", 3],
        "reconstruct": ["--num", 5, "--split", "train", "--seed", 1],
        "interpolate": ["--num", 2, "--steps", 4, "--split", "validation"],
        "manifold": ["--num", 5],
    }[command]
    path = tmp_path / "a.png"
    assert status(capsys, command, runs / "two", "--out", path, "--device", "cpu", *options)[0] == 0
    first = opened(path)
    assert status(capsys, command, runs / "two", "--out", path, "--device", "cpu", *options)[0] == 0
    assert (opened(path) == first).all()  # the same again
    assert status(capsys, command, runs / "two", "--out", path)[0] == 0
    other = opened(path)
    assert other.shape != first.shape or (other != first).any()


def test_a_program_of_a_file_is_drawn_when_it_is_named(capsys, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        textwrap.dedent("""
            import pyro, torch, pyro.distributions as dist
            from torch import nn

            class Own(nn.Module):
                def __init__(self, event_shape):
                    super().__init__()
                    self.decoder = nn.Linear(2, 2)

                def model(self, x):
                    with pyro.plate("data", x.shape[0], dim=-1):
                        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                        pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

                def guide(self, x):
                    with pyro.plate("data", x.shape[0], dim=-1):
                        pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

            def program(event_shape):
                return Own(event_shape)
            """)
    )
    data = pv.load_data("moons")
    pv.fit(load_program(file, (2,)), data, steps=3, out=tmp_path / "run")
    for command in COMMANDS:
        assert status(capsys, command, tmp_path / "run", "--model", file)[0] == 0
        code, _, err = status(capsys, command, tmp_path / "run")
        assert code == 2
        assert "--model FILE.py" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_user_can_mend(runs, capsys, tmp_path, command):
    before = sorted(p for p in tmp_path.rglob("*"))
    for args, message in (
        ([tmp_path / "none"], "no run directory"),
        ([runs / "two", "--out", tmp_path / "a.tiff"], "ends in .png"),
        ([runs / "two", "--out", tmp_path / "no" / "a.png"], "no directory"),
        ([runs / "two", "--num", 0], "--num"),
        ([runs / "two", "--device", "quantum"], "quantum"),
    ):
        code, out, err = status(capsys, command, *args)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert message in err
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_a_manifold_of_three_dimensions_is_refused_by_its_dimension(runs, capsys):
    code, out, err = status(capsys, "manifold", runs / "three")
    assert (code, out) == (2, "")
    assert "'z' of dimension 3" in err
    assert "latent_dim=2" in err
    assert not (runs / "three" / "manifold.png").exists()


@pytest.mark.parametrize("command", ["reconstruct", "interpolate"])
def test_the_data_have_to_be_there(runs, capsys, command):
    assert "hand them over" in status(capsys, command, runs / "tensor")[2]
    code, _, err = status(capsys, command, runs / "two", "--num", 10_000)
    assert code == 2
    assert "has 179 rows" in err
    assert "did you mean 'validation'" in status(capsys, command, runs / "two", "--split", "validatoin")[2]


@pytest.mark.parametrize("command", ["sample", "manifold"])
def test_no_data_are_needed_to_look_at_the_model(runs, capsys, command, tmp_path: Path):
    assert status(capsys, command, runs / "tensor", "--out", tmp_path / "a.png")[0] == 0
