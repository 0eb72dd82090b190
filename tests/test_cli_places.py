"""Where the command reads and writes: homes, files in the way, standard streams that are full, closed or of another encoding."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import commands
import pytest
import torch

import pyro_vae as pv
from pyro_vae.cli.app import run as command
from pyro_vae.errors import UserError
from pyro_vae.paths import expanded

FULL = Path("/dev/full")
FEW = ("--samples", "4", "--limit", "5", "--quiet")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("places") / "a run"
    data = pv.load_data("digits")
    small = "mlp:hidden=[4]"
    pv.fit(
        pv.build("mlp", "diagonal", data, latent_dim=2, encoder=small, decoder=small),
        data,
        steps=3,
        out=path,
        compile="off",
    )
    return path


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def closed() -> Any:
    stream = io.StringIO()
    stream.close()
    return stream


class Failing(io.StringIO):
    """A stream on a disk that is full, or gone."""

    def __init__(self, number: int = errno.EIO) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


def full() -> Any:
    return Failing(errno.ENOSPC)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    yield tmp_path / "home"
    assert not list((tmp_path / "work").iterdir())


STREAMS = [
    (full, os.strerror(errno.ENOSPC)),
    (Failing, os.strerror(errno.EIO)),
    (closed, "it is closed"),
    (lambda: None, "it is closed"),
]
COMMANDS = [["list", "priors"], ["list", "models", "--json"], ["--version"], ["show", "ppca"], ["export", "RUN"]]


@pytest.mark.parametrize(("stream", "why"), STREAMS)
@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda a: a[0])
def test_an_output_that_takes_no_more(
    arguments: list[str], stream: Callable[[], Any], why: str, copy: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "stdout", stream())
    assert command([str(copy) if a == "RUN" else a for a in arguments]) == 2
    assert capsys.readouterr().err.splitlines() == [f"error: cannot write to standard output: {why}"]


@pytest.mark.filterwarnings("ignore:.*too few for Pareto")
@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
@pytest.mark.parametrize(("stream", "why"), STREAMS)
@pytest.mark.parametrize(
    ("name", "file"), [("evaluate", "evaluation.json"), ("anomaly", "anomaly.json"), ("compare", None)]
)
def test_what_was_computed_is_kept_whatever_the_output(
    name: str, file: str | None, stream: Callable[[], Any], why: str, copy: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In the file, or where there is none on standard error."""
    monkeypatch.setattr(sys, "stdout", stream())
    more = {"evaluate": (), "anomaly": ("digits",), "compare": (str(copy),)}[name]
    assert command([name, str(copy), *more, "--json", *FEW]) == 2
    said = capsys.readouterr().err
    assert f"cannot write to standard output: {why}" in said.splitlines()[-1]
    if file is None:
        assert json.loads(said[said.index("{\n") : said.rindex("}") + 1])["num_data"] == 5
    else:
        assert f"what was found is in {copy / file}" in said
        assert json.loads((copy / file).read_text())["seed"] == 0


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
@pytest.mark.parametrize(
    ("name", "file"), [("evaluate", "evaluation.json"), ("anomaly", "anomaly.json"), ("anomaly", "anomaly.png")]
)
def test_what_was_computed_is_printed_where_it_cannot_be_written(
    name: str, file: str, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that fills up meanwhile."""
    opened = os.open

    def refuse(path: Any, *args: Any, **how: Any) -> Any:
        if os.path.basename(path).startswith(f".{file}"):
            raise OSError(28, os.strerror(28))
        return opened(path, *args, **how)

    monkeypatch.setattr("os.open", refuse)
    assert command([name, str(copy), *(("digits",) if name == "anomaly" else ()), "--json", *FEW]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["seed"] == 0
    assert f"error: cannot write {copy / file}: {os.strerror(28)}" in printed.err


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
@pytest.mark.parametrize("stream", [full, closed, lambda: None, Failing])
def test_a_standard_error_that_takes_no_more_is_no_reason_to_stop(
    stream: Callable[[], Any], copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", stream())
    assert command(["evaluate", str(copy), "--samples", "4", "--limit", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_data"] == 5
    assert command(["evaluate", str(copy / "nothing")]) == 2


@pytest.mark.slow
def test_processes_whose_streams_are_full_or_closed(copy: Path) -> None:
    """The interpreter too ends without a word of its own, and nothing is printed into a file."""
    close = "import os, sys; os.close(1); sys.stdout = None"
    fill = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
    for prelude, why in ((close, "it is closed"), *([(fill, os.strerror(28))] if FULL.exists() else [])):
        status, _, err = commands.start("list", "priors", prelude=prelude).finish()
        assert (status, err) == (2, f"error: cannot write to standard output: {why}\n")
        status, _, err = commands.start("evaluate", str(copy), *FEW, prelude=prelude).finish()
        assert status == 2
        assert "Traceback" not in err
        assert json.loads((copy / "evaluation.json").read_text())["num_data"] == 5
    status, out, _ = commands.start(
        "list", "nothing", prelude="import os, sys; os.close(2); sys.stderr = None"
    ).finish()
    assert (status, out) == (2, "")


def test_a_name_that_the_output_has_no_letters_for(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = copy.rename(tmp_path / "l\u00e4uft \u4f60")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert command(["sample", str(odd), "--num", "2"]) == 0
    assert stream.buffer.getvalue().decode() == ascii(str(odd / "sample.png"))[1:-1] + "\n"  # type: ignore[attr-defined]


def test_home_in_python(home: Path) -> None:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    program = pv.build("ppca", "linear", (3,), latent_dim=2)
    run = pv.fit(program, x, epochs=1, out="~/a/run")
    assert run.path == home / "a" / "run"
    pv.fit(program, x, epochs=1, out="~/a/run", resume=True)
    assert pv.load("~/a/run").path == home / "a" / "run"
    pv.export(program, "~/exported", parts=("decoder",))
    assert (home / "exported" / "decoder.pt2").is_file()
    (home / "m.toml").write_text((Path(pv.__file__).parent.parent / "models" / "ppca.toml").read_text())
    pv.build("~/m.toml", "linear", (3,), latent_dim=2)


def test_home_on_the_command_line(home: Path, copy: Path) -> None:
    """A shell leaves ~ alone after --out=."""
    copy.rename(home / "run")
    for arguments, file in (
        (["sample", "~/run", "--num=2", "--out=~/s.png"], "s.png"),
        (["export", "~/run", "--only=encoder", "--out=~/e"], "e/encoder.pt2"),
        (["posterior", "~/run", "--images=1", "--samples=2", "--out=~/p.nc"], "p.nc"),
        (["train", "--model=mixture", "--set=latent_dim=2", "--steps=1", "--quiet", "--out=~/new"], "new/spec.toml"),
    ):
        assert command(arguments) == 0
        assert (home / file).is_file()


@pytest.mark.parametrize("path", ["~nobody-of-that-name/x", "a\0b", "\udcff", 3, b"x"])
def test_what_is_no_path(path: Any, tmp_path: Path) -> None:
    for call in (
        lambda: expanded(path),
        lambda: pv.load(path),
        lambda: pv.load_data(path),
        lambda: pv.fit(pv.build("ppca", "linear", (3,), latent_dim=2), torch.zeros(9, 3), epochs=1, out=path),
    ):
        with pytest.raises(UserError):
            call()


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "RUN", "--out", "FILE"], ["export", "RUN", "--out", "FILE/below"], ["sample", "RUN", "--out", "FILE/x.png"],
        ["posterior", "RUN", "--out", "FILE/x.nc"], ["report", "RUN", "--out", "FILE/x.html"], ["train", "--out", "FILE"],
        ["train", "--out", "FILE/below"], ["evaluate", "FILE"], ["evaluate", "FILE/below"], ["evaluate", "LONG"],
        ["train", "LONG"],
        ["train", "--out", "LONG"], ["sample", "RUN", "--out", "LONG.png"], ["export", "RUN", "--out", "LONG"],
        ["compare", "RUN", "RUN", "--report", "FILE/x.html"], ["train", "--model", "LONG.toml"], ["train", "FILE/x.npy"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_places_that_cannot_be(
    arguments: list[str], copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file in the way, a name that is too long: one line, and nothing left."""
    (tmp_path / "file").write_text("")
    for word, place in (("RUN", copy), ("FILE", tmp_path / "file"), ("LONG", tmp_path / ("l" * 300))):
        arguments = [a.replace(word, str(place)) for a in arguments]
    before = sorted(tmp_path.rglob("*"))
    assert command([*arguments, *(["--steps", "1", "--quiet"] if arguments[0] == "train" else [])]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [line[:7] for line in printed.err.splitlines()] == ["error: "]
    assert sorted(tmp_path.rglob("*")) == before


def test_an_export_that_fails_leaves_nothing(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(program: Any, path: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(torch.export, "save", save)
    with pytest.raises(UserError, match=os.strerror(28)):
        pv.export(pv.load(copy).program, tmp_path / "new" / "exported")
    assert not (tmp_path / "new").exists()
