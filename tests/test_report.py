"""The reports: complete in themselves, whatever the data and the program are, and safe whatever the names are."""

from __future__ import annotations

import base64
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pytest
import torch
from PIL import Image

import pyro_vae as pv
from pyro_vae.analysis.report import page
from pyro_vae.analysis.report.likelihood import saved
from pyro_vae.analysis.report.of_runs import differences
from pyro_vae.analysis.report.subject import Subject
from pyro_vae.cli.app import run as command
from pyro_vae.errors import UserError
from pyro_vae.seeding import seeded
from pyro_vae.training.files import checksum_of, write_tensors

HOSTILE = "<script>alert('1')</script>&$x_{"
VOID = {"meta", "link", "img", "br"}
NETS = {"encoder": "mlp:hidden=[8]", "decoder": "mlp:hidden=[8]"}
QUICK = ["--limit", "12", "--samples", "30", "--quiet", "--device", "cpu"]


class Page(HTMLParser):
    """The elements of a page; fails where they are not nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(path: Path) -> Page:
    """A page that was written, held to what every page keeps."""
    text = path.read_text(encoding="utf-8")
    assert text.lstrip().startswith("<!DOCTYPE html>")
    found = Page(text)
    assert not found.all("script")
    assert not found.all("iframe")
    for _, attributes in found.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
        assert not any(name.startswith("on") for name in attributes)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "@media print" in style
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in found.all("meta")
    assert any("default-src 'none'" in (m.get("content") or "") for m in found.all("meta"))
    for image in found.all("img"):
        source = image["src"] or ""
        with Image.open(BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))) as opened:
            assert opened.format == "PNG"
        assert image["alt"]
    return found


pytestmark = pytest.mark.usefixtures("coarse_pages")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Programs by hand draw their weights from the global generators, which are put back."""
    with seeded(0):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the user's, of every kind."""
    found, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    np.save(found / "vectors.npy", random.normal(size=(60, 6)).astype(np.float32))
    np.save(found / "counts.npy", random.poisson(3, size=(60, 7)).astype(np.float32))
    np.save(found / "cubes.npy", random.normal(size=(60, 2, 3, 4)).astype(np.float32))
    np.savez(found / "labelled.npz", x=random.integers(0, 2, (60, 6)).astype(bool), y=random.integers(0, 3, 60))
    return found


def train(data: Any, program: Any, out: Path) -> pv.Run:
    return pv.fit(program, data, steps=4, batch_size=32, out=out, compile="off")


def digits(**how: Any) -> Callable[[Path], tuple[Any, Any]]:
    """The embedded digits and a small program for them."""

    def make(folder: Path) -> tuple[Any, Any]:
        data = pv.load_data("digits")
        return data, pv.build(
            how.get("model", "mlp"), how.get("guide", "diagonal"), data, latent_dim=how["latent_dim"], **NETS
        )

    return make


def declared(file: str, model: str, latent_dim: int) -> Callable[[Path], tuple[Any, Any]]:
    """A file of the user's and a small declared program for it."""

    def make(folder: Path) -> tuple[Any, Any]:
        data = pv.load_data(folder / file)
        return data, pv.build(model, "linear", data, latent_dim=latent_dim, decoder="linear")

    return make


ALWAYS = {
    "Training curves",
    "Pareto k and effective sample size",
    "Aggregate posterior and prior",
    "Calibration of the guide",
}
DRAWN = ALWAYS | {
    "Samples",
    "Reconstructions",
    "Reconstructions with their uncertainty",
    "The most surprising test data",
}
KINDS: dict[str, tuple[Any, set[str], set[str]]] = {
    "images": (digits(latent_dim=2), DRAWN | {"Manifold", "Traversals", "Interpolations", "Embedding"}, set()),
    "bits": (
        digits(latent_dim=4, model="binary-latents", guide="score-bernoulli"),
        (DRAWN | {"Traversals", "Embedding"}) - {"Pareto k and effective sample size"},
        {"Interpolations", "Manifold", "Pareto k and effective sample size"},  # 16 states: the likelihood is exact
    ),
    "vectors": (declared("vectors.npy", "ppca", 1), DRAWN | {"Traversals"}, {"Embedding", "Manifold"}),
    "counts": (declared("counts.npy", "poisson", 3), DRAWN | {"Traversals", "Embedding"}, {"Manifold"}),
    "cubes": (declared("cubes.npy", "ppca", 2), ALWAYS | {"Embedding"}, {"Samples", "Reconstructions", "Manifold"}),
    "conditional": (
        lambda folder: (pv.load_data(folder / "labelled.npz"), by_hand.Conditional()),
        DRAWN | {"Manifold", "Embedding"},
        set(),
    ),
    "hierarchy": (
        lambda folder: (pv.load_data(folder / "vectors.npy"), by_hand.TwoLayers()),
        DRAWN | {"Traversals", "Interpolations"},
        {"Manifold"},
    ),
}


# Images on a plane, and data without pictures: of the others each is between the two, or has a condition besides.
FAST = {"images", "cubes"}


@pytest.mark.parametrize("kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_every_kind_of_data_and_program_has_its_page(kind: str, folder: Path, tmp_path: Path) -> None:
    make, there, absent = KINDS[kind]
    data, program = make(folder)
    run = train(data, program, tmp_path / "run")
    found = read(pv.report(run, tmp_path / "page.html", limit=12, num_samples=30))
    pictures = {image["alt"] for image in found.all("img")}
    assert there <= pictures
    assert not absent & pictures
    for name in absent - {"Manifold"}:  # of a latent space that is no plane there is nothing to say
        assert re.search(f"{name}[^:.]*: left out", found.text), name
    assert re.search(r"NLL \(nats per (image|row)\)", found.text)
    assert "too few for Pareto k" not in found.text
    assert "active units" in found.text


def test_a_run_without_data_says_so_once(tmp_path: Path) -> None:
    train(torch.randn(40, 5), pv.build("ppca", "linear", (5,), latent_dim=2), tmp_path / "run")
    run = pv.load(tmp_path / "run")
    found = read(pv.report(run))
    assert {"Samples", "Training curves", "Manifold"} <= {image["alt"] for image in found.all("img")}
    assert found.text.count("was trained on data in memory, which have no path") == 2  # the data, and the evaluation
    assert "Reconstructions, Reconstructions with their uncertainty: left out. there are no data" in found.text
    with pytest.raises(UserError, match=r"ends in \.html"):
        pv.report(run, tmp_path / "page.txt")
    with pytest.raises(UserError, match="at least 2"):
        pv.report(run, limit=1)


def test_a_run_is_not_reported_on_data_that_were_prepared_otherwise(tmp_path: Path) -> None:
    data = pv.load_data("digits", dequantization="uniform")
    run = train(data, pv.build("ppca", "linear", data, latent_dim=2), tmp_path / "run")
    with pytest.raises(UserError, match=r"dequantization 'uniform', and digits is given with 'none': give data\.with_"):
        pv.report(run, data=data.with_(dequantization="none"))


# hardly anything is trained
@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
def test_names_and_files_are_text_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / HOSTILE.replace("/", "|")
    place.mkdir()
    source = place / f"{HOSTILE.replace('/', '|')}.npy"
    source.write_bytes((folder / "vectors.npy").read_bytes())
    run = train(pv.load_data(source), pv.build("ppca", "linear", (6,), latent_dim=2), place / "run")
    assert run.path is not None
    weights = {"weights_crc32": checksum_of(run.path / "weights.safetensors")}
    evil = {
        "nll": 3.5,
        "nll_mc_se": "<b>1</b>",
        "num_data": HOSTILE,
        "active_units": [HOSTILE],
        "warnings": [HOSTILE, 7],
        **weights,
    }
    (run.path / "evaluation.json").write_text(json.dumps(evil))
    (run.path / "anomaly.json").write_text(
        json.dumps({"scores": {HOSTILE: {"auroc": 0.5}}, "other": HOSTILE, **weights})
    )
    run.record["versions"][HOSTILE] = HOSTILE
    found = read(pv.report(run, place / "page.html", limit=12, num_samples=30))
    assert f"pyro-vae evaluate: {HOSTILE}" in found.text
    assert not found.all("b")
    other = train(pv.load_data(source), pv.build("ppca", "linear", (6,), latent_dim=1), place / "other")
    x = pv.load_data(source).observed("test")
    results = {name: pv.log_likelihood(r.program, x, num_samples=30) for name, r in ((HOSTILE, run), ("_b", other))}
    pair = pv.compare(results[HOSTILE], results["_b"], (HOSTILE, "_b"))
    found = read(pv.compare_report({HOSTILE: run, "_b": other}, results, [pair], place / "both.html"))
    assert f"{HOSTILE} - _b" in found.text


def test_a_damaged_evaluation_is_refused_by_its_name(tmp_path: Path) -> None:
    run = train(torch.randn(40, 5), pv.build("ppca", "linear", (5,), latent_dim=1), tmp_path / "run")
    for text in ('{"nll": "low"}', "[]", '{"nll": 1e999}', "{"):
        (tmp_path / "run" / "evaluation.json").write_text(text)
        found, (refused,) = saved(Subject(run, None, "", 2, 2, 0))
        assert found == {}
        assert "evaluation.json is damaged" in refused


def test_an_evaluation_of_other_weights_or_of_another_split_is_no_headline(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    run = train(pv.load_data(folder / "vectors.npy"), pv.build("ppca", "linear", (6,), latent_dim=1), path)
    evaluate = ["evaluate", str(path), "--samples", "50", "--quiet", "--device", "cpu"]
    assert command(evaluate) == 0
    kept = (path / "evaluation.json").read_text()
    assert command([*evaluate, "--split", "train"]) == 0
    assert (path / "evaluation.json").read_text() == kept
    assert json.loads((path / "evaluation-train.json").read_text())["split"] == "train"
    subject = Subject(pv.load(path), None, "", 2, 2, 0)
    assert list(saved(subject)[0]) == ["pyro-vae evaluate"]
    write_tensors(path / "weights.safetensors", {n: t + 1 for n, t in run.program.state_dict().items()})
    found, (refused,) = saved(subject)
    assert found == {}
    assert "evaluation.json is of other weights than these" in refused


def test_the_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [tmp_path / name for name in ("a", "b")]
    for path, dim in zip(runs, (1, 2), strict=True):
        train(pv.load_data(folder / "vectors.npy"), pv.build("ppca", "linear", (6,), latent_dim=dim), path)
    assert command(["evaluate", str(runs[0]), "--samples", "50", "--quiet", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert command(["report", str(runs[0]), *QUICK]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(runs[0] / "report.html")
    found = read(runs[0] / "report.html")
    assert "pyro-vae evaluate" in found.text
    assert "this page" in found.text
    both = tmp_path / "both.html"
    assert command(["compare", *map(str, runs), *QUICK, "--report", str(both), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["comparisons"]) == 1
    found = read(both)
    assert {"NLL of each run", "Training curves", *map(str, runs)} <= {image["alt"] for image in found.all("img")}
    assert "model.latent_dim" in found.text
    for arguments, message in (
        (["report", str(tmp_path / "none")], "no run directory"),
        (["report", str(runs[0]), "--out", "page.pdf"], "ends in .html"),
        (["report", str(runs[0]), "--out", str(tmp_path / "no" / "page.html")], "there is no directory"),
        (["compare", str(runs[0]), str(runs[0]), "--report", str(both)], "different names"),
        (["interpolate", str(runs[0]), "--path", "curly"], "unknown path 'curly'"),
    ):
        assert command(arguments) == 2
        assert message in capsys.readouterr().err


def test_differences_are_by_dotted_key() -> None:
    a = {"model": {"prior": {"name": "vamp", "components": 5}}, "versions": {"torch": "1"}}
    b = {"model": {"prior": {"name": "vamp", "components": 7}}, "versions": {"torch": "2"}, "data": {"name": "x"}}
    assert differences([a, b]) == [["model.prior.components", "5", "7"], ["data.name", "-", "x"]]
    assert differences([a, a]) == []


def test_the_wheel_holds_the_template(tmp_path: Path, python: Any) -> None:
    root = Path(page.__file__).parents[3]
    if not (root / "pyproject.toml").is_file():
        pytest.skip("the library is not tested from a checkout")
    done = python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(root))
    if "hatchling" in done.stderr + done.stdout and done.returncode:
        pytest.skip("hatchling is not installed: the wheel cannot be built without a network")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        assert "pyro_vae/analysis/report/page.html" in wheel.namelist()
