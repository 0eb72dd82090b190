"""What the user can mend: exit status 2, one line that names the value and what to do, and nothing left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyro_vae.cli.app import run
from pyro_vae.seeding import generator

SMALL = ["--encoder", "mlp:hidden=[8]", "--decoder", "mlp:hidden=[8]", "--set", "latent_dim=3", "--quiet"]
Capsys = pytest.CaptureFixture[str]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its contents, and every folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def refused(capsys: Capsys, folder: Path, arguments: list[str], *words: str) -> str:
    """Run a command line, hold its refusal to the contract, and return the one line."""
    before = tree(folder)
    capsys.readouterr()
    status = run(arguments)
    output = capsys.readouterr()
    assert status == 2, output.err
    assert output.out == ""
    lines = output.err.splitlines()
    assert len(lines) == 1, output.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in output.err
    assert len(lines[0]) < 800
    for word in words:
        assert word in lines[0], (word, lines[0])
    after = tree(folder)
    assert set(after) == set(before), "something was left behind"
    assert after == before
    return lines[0]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, with no data root but itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mnsit"], ["unknown data set 'mnsit'", "did you mean 'mnist'"]),
        (["nowhere/at/all"], ["'nowhere/at/all'", "check the path"]),
        (["nowhere.npy"], ["no file 'nowhere.npy'"]),
        (["frey-face"], ["'frey-face'", "frey_rawface.mat", "--data-root"]),
        (["--model", "mixtrue"], ["unknown model 'mixtrue'", "did you mean 'mixture'"]),
        (["--model", "nowhere.toml"], ["no model file 'nowhere.toml'"]),
        (["--guide", "diagnoal"], ["unknown guide 'diagnoal'", "did you mean 'diagonal'"]),
        (["--prior", "gausian-mixture"], ["unknown prior 'gausian-mixture'", "did you mean 'gaussian-mixture'"]),
        (["--likelihood", "bernouli"], ["unknown likelihood 'bernouli'", "did you mean 'bernoulli'"]),
        (["--posterior", "diagonal"], ["unknown posterior 'diagonal'", "diagonal-normal"]),
        (["--encoder", "mpl"], ["unknown encoder 'mpl'", "did you mean 'mlp'"]),
        (["--decoder", "mpl"], ["unknown decoder 'mpl'", "did you mean 'mlp'"]),
        (["--objective", "elbow"], ["unknown objective 'elbow'", "did you mean 'elbo'"]),
        (["--prior", "gaussian-mixture:component=3"], ["no option 'component'", "did you mean 'components'"]),
        (["--prior", "gaussian-mixture:components=-3"], ["components = -3"]),
        (["--prior", "gaussian-mixture:components"], ["expected key=value, got 'components'"]),
        (["--set", "laten_dim=3"], ["unknown key 'laten_dim'", "did you mean 'latent_dim'"]),
        (["--set", "latent_dim"], ["expected key=value, got 'latent_dim'"]),
        (["--set", "latent_dim=0"], ["latent_dim = 0"]),
        (["--set", "prior.component=3"], ["component"]),
        (["--epochs", "0"], ["--epochs 0", "at least 1"]),
        (["--epochs", "-3"], ["--epochs -3"]),
        (["--epochs", "many"], ["many"]),
        (["--steps", "0"], ["steps", "0"]),
        (["--epochs", "1", "--steps", "1"], ["epochs or steps, not both"]),
        (["--batch-size", "0"], ["batch_size = 0"]),
        (["--lr", "-1"], ["lr = -1"]),
        (["--lr", "nan"], ["lr = nan"]),
        (["--device", "gpu"], ["unknown device 'gpu'"]),
        (["--schedule", "linear"], ["'linear'", "one-cycle"]),
        (["--optimizer", "adm"], ["'adm'"]),
        (["--binarization", "dynamical"], ["dynamical", "dynamic"]),
        (["--binarization", "none"], ["Bernoulli", "binarization"]),
        (["--validation", "99999"], ["99999"]),
        (["--validation", "-1"], ["-1"]),
        (["--resume"], ["--resume needs --out"]),
        (["--resume", "--out", "nowhere"], ["no run directory 'nowhere'"]),
        (["--nonsense"], ["--nonsense"]),
        (["digits", "digits"], ["digits"]),
    ],
)
def test_train(arguments: list[str], words: list[str], place: Path, capsys: Capsys) -> None:
    out = [] if "--out" in arguments or "--resume" in arguments else ["--out", "out/run"]
    blocks = SMALL[:4] if not {"--encoder", "--decoder"} & set(arguments) else []
    refused(capsys, place, ["train", *arguments, *blocks, "--quiet", *out], *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_one(place: Path, capsys: Capsys) -> None:
    refused(capsys, place, ["train", *SMALL, "--device", "cuda", "--out", "out"], "'cuda'", "--device cpu")


@pytest.mark.parametrize("size", [(9, 9), (8, 7), (6,), (3, 8, 8, 2)])
def test_an_image_size_that_the_network_cannot_take(size: tuple[int, ...], place: Path, capsys: Capsys) -> None:
    np.save(
        place / "x.npy", np.full((20, *size), 200, np.uint8) if len(size) == 2 else np.zeros((20, *size), np.float32)
    )
    words = ["conv", "even height and width", "mlp"]
    common = ["train", "x.npy", "--model", "conv-2d", "--quiet", "--out", "out"]
    bernoulli = ["--binarization", "threshold"] if len(size) == 2 else []
    refused(capsys, place, [*common, *bernoulli, "--guide", "diagonal"], *words)
    refused(capsys, place, [*common, *bernoulli, "--guide", "conv"], *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("laten_dim = 3", ["m.toml", "unknown key 'laten_dim'", "did you mean 'latent_dim'"]),
        ('prior = { name = "gaussian-mixture", componets = 3 }', ["m.toml", "'componets'", "did you mean 'components'"]),
        ('prior = { components = 3 }', ["m.toml", "a table with a name"]),
        ('prior = "vampp"', ["m.toml", "unknown prior 'vampp'"]),
        ("latent_dim = 3.5", ["m.toml", "latent_dim = 3.5"]),
        ("latent_dim = -1", ["m.toml", "latent_dim = -1"]),
        ('program = "vea"', ["m.toml", "program", "'vea'"]),
        ("latent_dim = = 3", ["m.toml", "not valid TOML"]),
        ("[prior\nname = 3", ["m.toml", "not valid TOML"]),
        ("decoder = { name = \"mlp\", hidden = [] }", ["m.toml", "hidden"]),
        ("decoder = { name = \"mlp\", hidden = [0] }", ["m.toml", "hidden"]),
    ],
)  # fmt: skip
def test_a_model_file_with_a_mistake(text: str, words: list[str], place: Path, capsys: Capsys) -> None:
    (place / "m.toml").write_text(text)
    refused(capsys, place, ["train", "--model", "m.toml", "--quiet", "--out", "out"], *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", ["defines no program(event_shape)"]),
        ("def program(", ["fails when it is run", "SyntaxError"]),
        ("raise RuntimeError('oh')", ["fails when it is run", "oh"]),
        ("import torch\ndef program(shape): return torch.nn.Identity()", ["expected a Program"]),
    ],
)
def test_a_program_file_with_a_mistake(text: str, words: list[str], place: Path, capsys: Capsys) -> None:
    (place / "m.py").write_text(text)
    refused(capsys, place, ["train", "--model", "m.py", "--quiet", "--out", "out"], *words)
    refused(capsys, place, ["train", "--model", "m.py", "--guide", "diagonal", "--out", "out"], "its own guide")


# Data of the user's own


def pixels(fill: float | None = None) -> np.ndarray:
    x = np.random.default_rng(0).random((20, 6)).astype(np.float32)
    if fill is not None:
        x[7, 2] = fill
    return x


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (pixels(np.nan), ["NaN or infinite", "row 7"]),
        (pixels(np.inf), ["NaN or infinite", "row 7"]),
        (pixels(-np.inf), ["NaN or infinite", "row 7"]),
        (np.array([{"a": 1}] * 9, object), ["Python objects", "np.save"]),
        (np.array([["a", "b"]] * 9), ["<U1", "convert"]),
        (np.zeros((9, 3), complex), ["complex128", "convert"]),
        (np.zeros(9), ["shape (9,)"]),
        (np.zeros((0, 3)), ["empty"]),
        (np.full((9, 3), 300), ["300", "0 to 255"]),
        (pixels(), ["the data hold 0.637", "Bernoulli", "binarize grey levels"]),
    ],
)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_arrays(x: np.ndarray, words: list[str], suffix: str, place: Path, capsys: Capsys) -> None:
    path = place / f"x.{suffix}"
    np.save(path, x, allow_pickle=True) if suffix == "npy" else np.savez(path, x=x)  # type: ignore[arg-type]
    refused(capsys, place, ["train", path.name, *SMALL, "--out", "out"], *words)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"nonsense", None])
def test_a_corrupt_npz(damage: bytes | None, place: Path, capsys: Capsys) -> None:
    np.savez(place / "x.npz", x=pixels())
    whole = (place / "x.npz").read_bytes()
    (place / "x.npz").write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    refused(capsys, place, ["train", "x.npz", *SMALL, "--out", "out"], "x.npz", "np.savez")


def test_folders_of_images(place: Path, capsys: Capsys) -> None:
    from PIL import Image

    (place / "images").mkdir()
    common = ["train", "images", *SMALL, "--binarization", "threshold", "--out", "out"]
    refused(capsys, place, common, "'images'", "holds no image")
    for i in range(4):
        Image.new("L", (4, 4)).save(place / "images" / f"{i}.png")
    (place / "images" / "notes.txt").write_text("not an image")
    refused(capsys, place, common, "'notes.txt'", "not an image", "move the file")
    (place / "images" / "notes.txt").unlink()
    Image.new("L", (5, 4)).save(place / "images" / "9.png")
    refused(capsys, place, common, "5 x 4", "one size")
    refused(capsys, place, ["train", "images/0.png", *SMALL, "--out", "out"], "'images/0.png'", "'.png'")


# Output directories


def test_an_output_directory_that_cannot_be_written(place: Path, capsys: Capsys) -> None:
    (place / "file").write_text("in the way")
    for out in ("file/run", "file", "file/a/b"):
        refused(capsys, place, ["train", *SMALL, "--steps", "1", "--out", out], out, "choose another --out")


def test_an_output_directory_that_is_not_empty(place: Path, capsys: Capsys) -> None:
    (place / "full").mkdir()
    (place / "full" / "thesis.tex").write_text("mine")
    refused(capsys, place, ["train", *SMALL, "--steps", "1", "--out", "full"], "full", "not an empty directory")


# Runs


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is whole; copied before it is harmed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(["train", *SMALL, "--steps", "2", "--out", str(out)]) == 0
    return out


@pytest.fixture
def a_run(whole_run: Path, place: Path) -> Path:
    return Path(shutil.copytree(whole_run, place / "run"))


def test_an_output_directory_that_holds_a_run(a_run: Path, place: Path, capsys: Capsys) -> None:
    refused(capsys, place, ["train", *SMALL, "--steps", "1", "--out", "run"], "already holds a run", "--resume")


EVALUATE = ["evaluate", "run", "--samples", "30", "--limit", "3", "--quiet"]


@pytest.mark.parametrize("name", ["spec.toml", "weights.safetensors", "metrics.jsonl"])
def test_a_run_that_lacks_a_file(name: str, a_run: Path, place: Path, capsys: Capsys) -> None:
    (a_run / name).unlink()
    refused(capsys, place, EVALUATE, name, "missing")


CUTS: list[Callable[[bytes], bytes]] = [
    lambda whole: b"",
    lambda whole: whole[:7],
    lambda whole: whole[: len(whole) // 2],
    lambda whole: whole[:-1],
    lambda whole: b"\x00" * len(whole),
    lambda whole: b"\xff" * 50,
]


@pytest.mark.parametrize("cut", CUTS, ids=["empty", "seven bytes", "half", "all but one", "zeros", "no text"])
@pytest.mark.parametrize("name", ["spec.toml", "weights.safetensors", "metrics.jsonl"])
def test_a_run_whose_file_was_cut_short(
    name: str, cut: Callable[[bytes], bytes], a_run: Path, place: Path, capsys: Capsys
) -> None:
    whole = (a_run / name).read_bytes()
    (a_run / name).write_bytes(cut(whole))
    if name == "spec.toml" and cut(whole).strip() == whole.strip():
        assert run(EVALUATE) == 0  # nothing but the end of the last line is gone
    else:
        refused(capsys, place, EVALUATE, name)


@pytest.mark.parametrize("where", range(12))
def test_a_spec_cut_short_anywhere(where: int, a_run: Path, place: Path, capsys: Capsys) -> None:
    whole = (a_run / "spec.toml").read_bytes()
    (a_run / "spec.toml").write_bytes(whole[: len(whole) * where // 12])
    before = tree(place)
    capsys.readouterr()
    status = run(EVALUATE)
    output = capsys.readouterr()
    if status == 0:
        return  # all that evaluation needs stands before the cut
    assert status == 2, output.err
    assert len(output.err.splitlines()) == 1
    assert output.err.startswith("error: ")
    assert tree(place) == before


@pytest.mark.parametrize("cut", CUTS, ids=["empty", "seven bytes", "half", "all but one", "zeros", "no text"])
@pytest.mark.parametrize("name", ["checkpoint.safetensors", "weights.safetensors", "metrics.jsonl"])
def test_resuming_a_run_whose_file_was_cut_short(
    name: str, cut: Callable[[bytes], bytes], a_run: Path, place: Path, capsys: Capsys
) -> None:
    whole = (a_run / name).read_bytes()
    (a_run / name).write_bytes(cut(whole))
    refused(capsys, place, ["train", "--resume", "--out", "run", "--quiet"], name.partition(".")[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--resume", "--out", "run", "--lr", "0.1", "--epochs", "9"], ["leave out --lr"]),
        (["train", "moons", "--resume", "--out", "run"], ["the data of the run, digits: leave out moons"]),
        ([*EVALUATE, "--chains", "3"], ["--method iw", "leave out --chains"]),
        (
            ["evaluate", "run", "--method", "ais", "--noise", "sobol", "--samples", "3"],
            ["leave out --samples, --noise"],
        ),
    ],
)
def test_options_that_would_be_ignored(
    arguments: list[str], words: list[str], a_run: Path, place: Path, capsys: Capsys
) -> None:
    refused(capsys, place, arguments, *words)


@pytest.mark.filterwarnings(
    "ignore:.*nearly black"
)  # which they are, as grey levels: the error that follows is the subject
def test_counts_are_kept_in_floats(place: Path, capsys: Capsys) -> None:
    counts = np.random.default_rng(0).poisson(3, (60, 6))
    np.save(place / "whole.npy", counts)
    np.save(place / "floats.npy", counts.astype(np.float32))
    train = ["--likelihood", "poisson", "--encoder", "mlp", "--decoder", "mlp", "--steps", "1", "--quiet"]
    refused(capsys, place, ["train", "whole.npy", *train, "--out", "run"], "keep counts in a file of float32")
    assert run(["train", "floats.npy", *train, "--out", "run"]) == 0


def test_no_run_there(place: Path, capsys: Capsys) -> None:
    refused(capsys, place, ["evaluate", "nowhere"], "no run directory 'nowhere'", "pyro-vae train")
    (place / "empty").mkdir()
    refused(capsys, place, ["evaluate", "empty"], "spec.toml is missing")
    (place / "file").write_text("")
    refused(capsys, place, ["evaluate", "file"], "'file'")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples", "0"], ["--samples", "0"]),
        (["--samples", "-5"], ["-5"]),
        (["--limit", "0"], ["--limit", "0"]),
        (["--split", "tset"], ["'tset'", "did you mean 'test'"]),
        (["--device", "gpu"], ["unknown device 'gpu'"]),
        (["--seed", "-1"], ["--seed", "-1"]),
    ],
)
def test_evaluate(arguments: list[str], words: list[str], a_run: Path, place: Path, capsys: Capsys) -> None:
    refused(capsys, place, ["evaluate", "run", "--quiet", *arguments], *words)
    refused(capsys, place, ["evaluate", "run", "--quiet", "--json", *arguments], *words)


def test_the_weights_of_another_program(a_run: Path, place: Path, capsys: Capsys) -> None:
    text = (a_run / "spec.toml").read_text()
    (a_run / "spec.toml").write_text(text.replace("latent_dim = 3", "latent_dim = 4"))
    refused(capsys, place, EVALUATE, "weights of another program")


def test_data_that_went_away(place: Path, capsys: Capsys) -> None:
    x = torch.rand(30, 6, generator=generator(0)).round().to(torch.bool).numpy()
    np.save(place / "x.npy", x)
    assert run(["train", "x.npy", *SMALL, "--steps", "1", "--out", "run"]) == 0
    (place / "x.npy").unlink()
    refused(capsys, place, EVALUATE, "x.npy")


def test_a_manifold_of_a_latent_space_that_is_not_two_dimensional(a_run: Path, place: Path, capsys: Capsys) -> None:
    refused(capsys, place, ["manifold", "run", "--out", "m.png"], "dimension 2", "dimension 3")


@pytest.mark.parametrize("command", ["sample", "reconstruct", "interpolate", "manifold"])
def test_pictures_of_a_run_that_is_not_there(command: str, place: Path, capsys: Capsys) -> None:
    refused(capsys, place, [command, "nowhere", "--out", "p.png"], "no run directory 'nowhere'")


def test_a_fault_of_ours_is_status_1(place: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("pyro_vae.training.fit.fit", broken)
    assert run(["train", *SMALL, "--out", "out"]) == 1
    error = capsys.readouterr().err
    assert "ZeroDivisionError: a bug" in error
    assert "fault of pyro-vae" in error


def test_an_interrupt_is_no_traceback(place: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyro_vae.training.fit.fit", stopped)
    assert run(["train", *SMALL, "--out", "out"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_no_memory_is_one_line(error: Exception, place: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def starved(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("pyro_vae.training.fit.fit", starved)
    refused(capsys, place, ["train", *SMALL, "--out", "out"], "out of memory", "choose smaller sizes")
