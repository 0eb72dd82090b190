"""Reports speak the data's language: columns by name, rows and not images, series as series; and so do scores of tables."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import pyro_vae as pv
from pyro_vae.analysis.drawing import curves, is_image, speaking
from pyro_vae.analysis.report.page import _spoken
from pyro_vae.analysis.report.subject import Subject
from pyro_vae.cli.app import run as command
from pyro_vae.data.alike import observed_like
from pyro_vae.seeding import generator

NAMES = ("age", "height", "income", "debt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("language")
    x = np.random.default_rng(0).normal(size=(120, 4)) @ np.diag([1, 5, 10, 2])
    np.savetxt(where / "table.csv", x, delimiter=",", header=",".join(NAMES), comments="")
    np.savetxt(where / "other.csv", x[:30, [3, 1, 0, 2]], delimiter=",", header="debt,height,age,income", comments="")
    np.savetxt(where / "lacking.csv", x[:30, :3], delimiter=",", header=",".join(NAMES[:3]), comments="")
    np.save(where / "unnamed.npy", x[:30])
    data = pv.load_data(where / "table.csv")
    how = {"epochs": 2, "compile": "off", "device": "cpu"}
    pv.fit(pv.build("ppca", "linear", data, latent_dim=2), data, out=where / "run", **how)  # type: ignore[arg-type]
    return where


def test_columns_go_by_their_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, other = pv.load_data(folder / "table.csv"), pv.load_data(folder / "other.csv")
    assert data.column_names == NAMES
    assert data.with_(binarization="none").column_names == NAMES
    assert pv.load_data(folder / "unnamed.npy").column_names is None
    torch.testing.assert_close(observed_like(data, other, "train"), other.observed("train")[:, [2, 1, 3, 0]])
    scores = []
    for file in ("other.csv", "unnamed.npy"):
        assert command(["score", str(folder / "run"), str(folder / file), "--samples", "20", "--quiet"]) == 0
        scores.append([line.split(",")[1] for line in capsys.readouterr().out.splitlines()[1:]])
    assert scores[0] == scores[1]
    assert command(["score", str(folder / "run"), str(folder / "lacking.csv"), "--quiet"]) == 2
    assert "lacking.csv has no column 'debt'" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")  # few draws
def test_a_report_on_a_table_names_its_columns_and_no_image(folder: Path) -> None:
    page = pv.report(pv.load(folder / "run"), folder / "page.html", limit=12, num_samples=30).read_text()
    text = re.sub(r"<[^>]+>", " ", re.sub(r'<style>.*?</style>|src="[^"]+"', "", page, flags=re.DOTALL))
    assert not re.search(r"\bimages?\b|mean_ink|roughness", text, re.IGNORECASE)
    assert "left out" not in text
    assert re.search(r"income\s+\S+\s+\S+\s+0\.\d\d\s+\d+%", text)  # a test quantity
    assert re.search(r"(age|height|income|debt) = \S+ \(", text)  # of a surprising row


def test_what_a_datum_is() -> None:
    random = generator("test: data of a kind")
    made = lambda *shape: torch.rand(*shape, generator=random)  # noqa: E731

    def kind(x: torch.Tensor) -> tuple[str, tuple[str, ...]]:
        data = pv.data.Data("x", x, x[:0], x, None)  # type: ignore[attr-defined]
        run = pv.Run(None, None, {"program": {"event_shape": list(x.shape[1:])}})
        subject = Subject(run, data, "", 10, 10, 0)
        return subject.kind, subject.columns

    assert kind(made(5, 8, 8)) == ("image", ())
    assert kind(3 * made(5, 8, 2)) == ("series", ())
    assert kind(made(5, 40)) == ("series", ())
    assert kind(made(5, 3)) == ("table", ("column 0", "column 1", "column 2"))
    assert kind(made(5, 2)) == ("point", ("column 0", "column 1"))
    with speaking(series=True):
        assert not is_image((8, 2))
        assert len(curves({"a": made(3, 8, 2)}).lines) == 6
    with speaking(columns=NAMES):
        ax = curves({"a": made(3, 4)})
        assert [label.get_text() for label in ax.get_xticklabels()] == list(NAMES)
    assert is_image((8, 2))


def test_words_of_the_page_and_not_of_the_user() -> None:
    assert _spoken(["2 images", "the image."], "row") == ["2 rows", "the row."]
    for text in ("runs/images/a", "image.npy", "my-image-set", "data:image/png;base64,"):
        assert _spoken(text, "row") == text


def test_posteriors_of_rows_that_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "posterior",
        str(folder / "run"),
        "--samples",
        "5",
        "--chains",
        "1",
        "--quiet",
        "--out",
        str(folder / "z.nc"),
    ]
    assert command([*arguments, "--rows", "7,3"]) == 0
    with xr.open_datatree(folder / "z.nc", engine="h5netcdf") as tree:
        assert tree.posterior["image"].values.tolist() == [7, 3]
    capsys.readouterr()
    for rows, message in (("3,x", "expected numbers of rows"), ("99", "has the rows 0 to 11"), ("3,3", "named twice")):
        assert command([*arguments, "--rows", rows]) == 2
        assert message in capsys.readouterr().err
    assert command([*arguments, "--rows", "3", "--images", "2"]) == 2
    assert "exclude each other" in capsys.readouterr().err
