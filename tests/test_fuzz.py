"""Files that arrive broken, or from strangers: an error of one line, or the right thing, and nothing else."""

from __future__ import annotations

import contextlib
import io
import itertools
import shutil
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import commands
import fuzzing
import numpy as np
import pytest
import tomli_w
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyro_vae as pv
from pyro_vae import memory
from pyro_vae.cli.app import run as command
from pyro_vae.errors import UserError
from pyro_vae.seeding import generator
from pyro_vae.spec import Spec, construct, read
from pyro_vae.training.run import FILES

CASES: Counter[str] = Counter()
IN_PROCESS, COMMANDS = 2_000, 50
MEMORY = 300_000_000  # bytes that a declared model may take here


def cases(fast: int, slow: int) -> Any:
    """So many in the fast suite, so many in the slow one."""
    return pytest.mark.parametrize("number", [fast, pytest.param(slow, marks=pytest.mark.slow)])


def fuzz(number: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None], name: str) -> None:
    """Run ``check`` on ``number`` cases, the same ones every time."""

    @settings(
        max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def run(case: Any) -> None:
        CASES[name] += 1
        with torch.random.fork_rng(devices=[]):
            check(case)

    run()
    print(f"{name}: {CASES[name]} cases")


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole run, data, and a secret outside of where cases are laid out."""
    ground = tmp_path_factory.mktemp("fuzz")
    (ground / "outside").mkdir()
    (ground / "outside" / "secret").write_text("latent_dim = 3\n")
    x = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    np.save(ground / "outside" / "x.npy", x)
    data = pv.load_data(ground / "outside" / "x.npy", dequantization="uniform")
    vae = pv.build(
        "mlp", "diagonal", data, likelihood="normal", latent_dim=2, encoder="mlp:hidden=[4]", decoder="mlp:hidden=[4]"
    )
    pv.fit(vae, data, epochs=2, batch_size=8, out=ground / "whole", average=None)
    return ground


@pytest.fixture
def lay(ground: Path) -> Iterator[Callable[[], Path]]:
    """Copies of the whole run, each in a folder that goes with the test."""
    folder = ground / "cases"
    count = itertools.count()

    def copy() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return Path(shutil.copytree(ground / "whole", folder / f"run{next(count)}"))

    yield copy
    shutil.rmtree(folder, ignore_errors=True)


@cases(15, 700)
def test_specs(number: int, ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model or a guide in TOML: of the right words in the wrong places, of sizes that nobody has, or of any bytes."""
    monkeypatch.setattr(memory, "available", lambda: MEMORY)
    valid = (Path(__file__).parent.parent / "models" / "mixture.toml").read_bytes()
    path = tmp_path / "declared.toml"
    texts = st.one_of(
        fuzzing.tables.map(lambda table: tomli_w.dumps(table).encode("utf-8", "replace")),
        st.tuples(st.sampled_from(fuzzing.KEYS), st.integers(0, 100_000)).map(
            lambda t: f"{t[0]} = {'[' * t[1]}".encode()
        ),
        fuzzing.ruins.map(lambda ruin: ruin),
        st.binary(max_size=100),
    )

    def check(text: Any) -> None:
        fuzzing.clear(path)
        path.write_bytes(valid if callable(text) else text)
        if callable(text):
            text(path)
        with fuzzing.guarded(ground / "outside"), contextlib.suppress(UserError):
            for kind in ("models", "guides"):
                declared: Any = read(kind, path)  # type: ignore[arg-type]
                spec = Spec(**{kind[:-1]: declared})
                assert Spec.from_toml(spec.to_toml()) == spec
                construct(spec, (1, 8, 8))

    fuzz(number, texts, check, "specs")


sizes = st.lists(st.sampled_from([*fuzzing.HUGE, 8, 3.5, "8", True]), max_size=4)
changes = st.one_of(
    st.tuples(st.just("program"), st.sampled_from(["event_shape"]), sizes),
    st.tuples(st.just("program"), st.sampled_from(["dtype", "class", "file", "sha256"]), fuzzing.values),
    st.tuples(st.sampled_from(["data", "training", "model", "guide", "versions", "x"]), st.sampled_from(
        ["name", "root", "validation", "binarization", "epochs", "batch_size", "lr", "resume", "out", "objective", *fuzzing.KEYS]
    ), fuzzing.values),
)  # fmt: skip


def declared_otherwise(change: tuple[str, str, Any]) -> fuzzing.Ruin:
    """A run's spec with one value of one table replaced."""

    def ruin(path: Path) -> None:
        if path.name == "spec.toml":
            import tomllib

            record = tomllib.loads(path.read_text())
            record.setdefault(change[0], {})[change[1]] = change[2]
            path.write_bytes(tomli_w.dumps(record).encode("utf-8", "replace"))

    return ruin


broken_runs = st.one_of(
    st.tuples(st.sampled_from(FILES), fuzzing.ruins),
    st.tuples(st.sampled_from([f for f in FILES if f.endswith("safetensors")]), fuzzing.headers()),
    st.tuples(st.just("spec.toml"), changes.map(declared_otherwise)),
)


@cases(25, 800)
def test_runs(number: int, ground: Path, lay: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run directory with one file broken, replaced or forged: loaded, sampled from, and trained on."""
    monkeypatch.setattr(memory, "available", lambda: MEMORY)

    def check(case: tuple[str, fuzzing.Ruin]) -> None:
        path = lay()
        case[1](path / case[0])
        with fuzzing.guarded(ground / "outside"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(UserError):
                run = pv.load(path)
                assert repr(run)
                pv.sample(run.program, 2)
                run.load_data()
            errors = io.StringIO()
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                status = command(["train", "--out", str(path), "--resume", "--quiet"])
            assert status in (0, 2), errors.getvalue()
            assert "Traceback" not in errors.getvalue()

    fuzz(number, broken_runs, check, "runs")


def npz(**arrays: np.ndarray) -> bytes:
    """A .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    """A .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def declared_array(shape: list[Any], descr: str) -> bytes:
    """A .npy file that declares what it does not hold."""
    text = repr({"descr": descr, "fortran_order": False, "shape": tuple(shape)}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(640)


def bomb() -> bytes:
    """A .npz file of 400 kB that unpacks to 400 MB."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as file,
    ):
        text = repr({"descr": "|u1", "fortran_order": False, "shape": (400, 1_000_000)}).encode()
        file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)
        for _ in range(400):
            file.write(bytes(1_000_000))
    return buffer.getvalue()


@cases(30, 500)
def test_arrays(number: int, ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An array of the user's own: of any dtype and shape, damaged, pickled, or declaring more than there is."""
    monkeypatch.setattr(memory, "available", lambda: MEMORY)
    x = np.random.default_rng(0).integers(0, 256, (20, 4, 4)).astype(np.uint8)
    whole = {".npy": npy(x), ".npz": npz(x=x, y=np.arange(20))}
    dtypes = st.sampled_from(["|u1", "<i8", "<f4", "<f8", "<f2", "|b1", "<c8", "|O", "<U3", "<M8[s]", "|V8", ">f4"])
    shapes = st.lists(st.sampled_from([0, 1, 2, 3, 5, 10]), max_size=4)
    arrays = st.tuples(dtypes, shapes).map(
        lambda t: np.zeros(t[1], t[0]) if t[0] != "|O" else np.full(t[1], {}, dtype=object)
    )
    contents = st.one_of(
        st.tuples(st.just(".npy"), arrays.map(npy)),
        st.tuples(st.just(".npz"), st.builds(lambda a, b: npz(x=a, labels=b), arrays, arrays).filter(bool)),
        st.tuples(
            st.just(".npy"),
            st.builds(declared_array, st.lists(st.sampled_from([*fuzzing.HUGE, 20]), max_size=3), dtypes),
        ),
        st.tuples(st.sampled_from([".npy", ".npz"]), fuzzing.ruins),
    )

    def check(case: tuple[str, Any]) -> None:
        path = tmp_path / f"x{case[0]}"
        fuzzing.clear(path)
        path.write_bytes(whole[case[0]] if callable(case[1]) else case[1])
        if callable(case[1]):
            case[1](path)
        with fuzzing.guarded(ground / "outside"), contextlib.suppress(UserError):
            data = pv.load_data(path)
            assert torch.isfinite(data.observed("test")).all()
            assert torch.isfinite(data.mean_image()).all()

    fuzz(number, contents, check, "arrays")


def test_an_array_that_unpacks_to_more_than_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: MEMORY)
    (tmp_path / "x.npz").write_bytes(bomb())
    with fuzzing.guarded(tmp_path), pytest.raises(UserError, match=r"would take 400 MB of memory, and 300 MB are free"):
        pv.load_data(tmp_path / "x.npz")


def png(width: int, height: int, colour: int = 0) -> bytes:
    """A grey picture that declares a size, whatever it holds."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\x00" + bytes(min(width, 16)) for _ in range(min(height, 16)))
    head = struct.pack(">IIBBBBB", width % 2**32, height % 2**32, 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@cases(40, 300)
def test_image_folders(number: int, ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of pictures among which one is none, or is another, or is no file."""
    monkeypatch.setattr(memory, "available", lambda: MEMORY)
    places = st.sampled_from(["b.png", "a/b.png", "a/b/c.png", ".hidden", "z.jpg"])
    sizes = st.sampled_from([0, 1, 4, 8, 100_000, 2**31 - 1])
    contents = st.one_of(st.builds(png, sizes, sizes, st.sampled_from([0, 2, 3, 4, 6, 9])), fuzzing.ruins)
    folder = tmp_path / "pictures"

    def check(case: tuple[str, Any]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in ("1", "2", "3", "4"):
            (folder / f"{name}.png").write_bytes(png(4, 4))
        path = folder / case[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(4, 4) if callable(case[1]) else case[1])
        if callable(case[1]):
            case[1](path)
        with fuzzing.guarded(ground / "outside"), contextlib.suppress(UserError):
            data = pv.load_data(folder)
            assert torch.isfinite(data.observed("test")).all()

    fuzz(number, st.tuples(places, contents), check, "image folders")


@cases(2, 60)
def test_commands(number: int, ground: Path, lay: Callable[[], Path]) -> None:
    """The same through the command, in a process of its own: exit status 0 or 2, one line on standard error, no traceback."""
    whole = (Path(__file__).parent.parent / "models" / "mixture.toml").read_bytes()
    strategy = st.tuples(
        broken_runs,
        st.sampled_from(["evaluate", "sample", "resume", "train"]),
        fuzzing.tables.map(lambda table: tomli_w.dumps(table).encode("utf-8", "replace")) | fuzzing.ruins,
    )

    def check(case: tuple[tuple[str, fuzzing.Ruin], str, Any]) -> None:
        (file, ruin), which, text = case
        path = lay()
        arguments = {
            "evaluate": ["evaluate", str(path), "--samples", "2", "--limit", "3", "--json", "--quiet"],
            "sample": ["sample", str(path), "--num", "4"],
            "resume": ["train", "--out", str(path), "--resume", "--quiet"],
            "train": ["train", "--model", str(path / "m.toml"), "--out", str(path / "new"), "--epochs", "1", "--quiet"],
        }[which]
        if which == "train":
            (path / "m.toml").write_bytes(whole if callable(text) else text)
            if callable(text):
                text(path / "m.toml")
        else:
            ruin(path / file)
        before = fuzzing.listing(ground / "outside")
        status, _, err = commands.run(*arguments)
        assert status in (0, 2), (arguments, err)
        assert "Traceback" not in err
        if status == 2:
            assert err.count("error: ") >= 1
            assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1, err
            assert not (path / "new").exists()
        assert fuzzing.listing(ground / "outside") == before

    fuzz(number, strategy, check, "commands")


@pytest.mark.slow
def test_there_were_enough() -> None:
    """Last, of a whole run of this file."""
    in_process = sum(n for name, n in CASES.items() if name != "commands")
    print(f"{in_process} cases in process, {CASES['commands']} through the command: {dict(CASES)}")
    if set(CASES) == {"specs", "runs", "arrays", "image folders", "commands"}:
        assert in_process >= IN_PROCESS
        assert CASES["commands"] >= COMMANDS


def test_a_trained_tensor_has_no_place(tmp_path: Path) -> None:
    """A run in a file says nothing about where data lie that it was handed; one in memory still has them."""
    vae = pv.build("ppca", "linear", (3,), latent_dim=2)
    x = torch.rand(20, 3, generator=generator(0))
    run = pv.fit(vae, x, epochs=1, batch_size=10, out=tmp_path / "run")
    assert torch.equal(run.load_data().test, x)
    with pytest.raises(UserError, match="hand them over in Python"):
        pv.load(tmp_path / "run").load_data()
