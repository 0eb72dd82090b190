"""Pictures are the library's own whatever matplotlib was told; files lie where they were meant to, with the user's modes."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import pyro_vae as pv
from pyro_vae.analysis.drawing import PICTURES, save
from pyro_vae.analysis.pictures import interpolations, reconstructions, samples, training_curves
from pyro_vae.cli.app import run as command
from pyro_vae.errors import UserError
from pyro_vae.seeding import generator

pytestmark = pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
HOSTILE = {
    "text.usetex": True, "font.family": "no such font", "axes.facecolor": "black", "savefig.bbox": "tight",
    "savefig.dpi": 17.0, "axes.titlesize": 40.0, "lines.linewidth": 9.0, "savefig.transparent": True, "svg.fonttype": "none",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> pv.Run:
    data = pv.load_data("digits")
    small = "mlp:hidden=[8]"
    vae = pv.build("mlp", "diagonal", data, latent_dim=2, encoder=small, decoder=small)
    return pv.fit(vae, data, epochs=2, compile="off", device="cpu", out=tmp_path_factory.mktemp("places") / "run")


def x(run: pv.Run, n: int = 20) -> Any:
    return run.load_data().observed("test", rows=range(n))


FUNCTIONS: dict[str, Callable[[pv.Run], Any]] = {
    "samples": lambda run: samples(run.program, 9),
    "reconstructions": lambda run: reconstructions(run.program, x(run)),
    "interpolations": lambda run: interpolations(run.program, x(run, 4)),
    "training": training_curves,
    "traversals": lambda run: pv.traversals(run.program, x(run)),
    "embedding": lambda run: pv.embedding(run.program, x(run)),
    "aggregate": lambda run: pv.aggregate_posterior(run.program, x(run, 60)),
    "uncertainty": lambda run: pv.reconstruction_uncertainty(run.program, x(run, 4), num_samples=5),
    "nearest": lambda run: pv.nearest_training(x(run, 4), x(run)),
}


# What is drawn is one figure whatever it is saved as: every function in one format, one function in all of them.
DRAWN = [
    pytest.param(ending, name, marks=[] if ending == ".png" or name == "samples" else pytest.mark.slow)
    for ending in PICTURES
    for name in FUNCTIONS
]


@pytest.mark.parametrize(("ending", "name"), DRAWN)
def test_a_picture_is_the_same_whatever_matplotlib_was_told(
    name: str, ending: str, trained: pv.Run, tmp_path: Path
) -> None:
    plain = save(FUNCTIONS[name](trained), tmp_path / f"plain{ending}").read_bytes()
    with matplotlib.rc_context(HOSTILE):
        hostile = save(FUNCTIONS[name](trained), tmp_path / f"hostile{ending}").read_bytes()
        assert matplotlib.rcParams["text.usetex"]
    assert hostile == plain
    assert plain.startswith({".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[ending])


def test_a_figure_drawn_under_latex_is_saved_without_it(tmp_path: Path) -> None:
    with matplotlib.rc_context({"text.usetex": True}):
        figure = Figure()
        figure.add_subplot().set_title("a title")
        assert save(figure, tmp_path / "a.pdf").stat().st_size > 1000


def test_another_ending_is_refused(trained: pv.Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ends in \.png or \.pdf or \.svg, got .*a\.tiff"):
        save(samples(trained.program), tmp_path / "a.tiff")


@pytest.mark.slow
def test_every_command_draws_under_a_hostile_matplotlibrc_and_backend(trained: pv.Run, tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: no such font\nbackend: TkAgg\n")
    run = shutil.copytree(str(trained.path), tmp_path / "run")
    env = {**os.environ, "MPLCONFIGDIR": str(tmp_path), "PATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for line in ("sample", "reconstruct", "interpolate", "manifold", "report", "anomaly moons"):
        name, *rest = line.split()
        done = subprocess.run(
            [sys.executable, "-m", "pyro_vae.cli", name, str(run), *rest],
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode in (0, 2 if rest else 0), done.stderr
        assert "fault of pyro-vae" not in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["sample", "reconstruct", "interpolate", "manifold"])
@pytest.mark.parametrize("ending", ["pdf", "svg"])
def test_commands_write_pdf_and_svg(name: str, ending: str, trained: pv.Run, tmp_path: Path) -> None:
    assert command([name, str(trained.path), "--out", str(tmp_path / f"a.{ending}")]) == 0
    assert (tmp_path / f"a.{ending}").stat().st_size > 1000


def test_samples_as_numbers(trained: pv.Run, tmp_path: Path) -> None:
    assert command(["sample", str(trained.path), "--num", "7", "--draws", "--out", str(tmp_path / "a.npy")]) == 0
    drawn = np.load(tmp_path / "a.npy")
    assert drawn.shape == (7, 1, 8, 8)
    assert torch.equal(torch.from_numpy(drawn), pv.sample(trained.program, 7, mean=False))
    assert command(["reconstruct", str(trained.path), "--out", str(tmp_path / "b.npy")]) == 2


def test_evaluate_without_saving(trained: pv.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(str(trained.path), tmp_path / "run"))
    before = sorted(p.name for p in run.iterdir())
    for method in ("iw", "ais"):
        few = ["--samples", "5"] if method == "iw" else ["--chains", "2", "--distributions", "3"]
        line = ["evaluate", str(run), "--method", method, *few, "--limit", "3", "--quiet", "--no-save"]
        assert command(line) == 0
        assert "NLL" in capsys.readouterr().out
    assert sorted(p.name for p in run.iterdir()) == before


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_run_that_can_only_be_read_is_evaluated_and_told_of(
    number: int, trained: pv.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(str(trained.path), tmp_path / "run"))
    opened = os.open

    def read_only(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_WRONLY and str(path).startswith(str(run)):
            raise OSError(number, os.strerror(number))
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)
    assert command(["evaluate", str(run), "--samples", "5", "--limit", "3", "--quiet"]) == 0
    said = capsys.readouterr()
    assert "NLL" in said.out
    assert f"not saved: {run} can only be read" in said.err


@pytest.mark.usefixtures("coarse_pages")
def test_a_run_stays_where_it_was_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(40, 3, generator=generator("test of places"))
    how: dict[str, Any] = {"compile": "off", "device": "cpu", "out": "run"}
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    vae = pv.build("ppca", "linear", (3,), latent_dim=2)
    run = pv.fit(vae, rows, epochs=4, callback=lambda m: os.chdir(tmp_path / "there"), **how)
    assert run.path == tmp_path / "here" / "run"
    assert not list((tmp_path / "there").iterdir())
    os.chdir(tmp_path / "here")
    loaded = pv.load("run")
    os.chdir(tmp_path)
    assert loaded.path is not None
    assert loaded.path.is_dir()
    assert len(loaded.metrics) == 4
    assert pv.report(run, limit=5, num_samples=20).parent == run.path


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_follow_the_umask(mask: int, trained: pv.Run, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        vae = pv.build("ppca", "linear", (3,), latent_dim=2)
        run = pv.fit(vae, torch.zeros(20, 3) + torch.arange(20)[:, None], epochs=1, compile="off", out=tmp_path / "run")
        pv.export(vae, tmp_path / "exported")
        save(samples(trained.program), tmp_path / "a.png")
    finally:
        os.umask(before)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 6
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o666 & ~mask}
    assert run.path is not None


@pytest.mark.slow
@pytest.mark.parametrize("how", ["off", "on"])
def test_a_cache_that_cannot_be_used_costs_speed_alone(how: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    script = (
        "import os, torch, pyro_vae as pv\n"
        f"run = pv.fit(pv.build('ppca', 'linear', (3,), latent_dim=2), torch.randn(60, 3), steps=9, compile={how!r})\n"
        "print(len(run.metrics), os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    )
    place = str(tmp_path / "file" / "cache")
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": place, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == place
