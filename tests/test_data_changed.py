"""Data that change between training and evaluation: the rows that were trained, or an error that says what changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import pyro_vae as pv
from pyro_vae.cli.app import run as command
from pyro_vae.data import content
from pyro_vae.errors import UserError
from pyro_vae.training.files import read_tensors, write_tensors

N = 60
SPLITS = ("train", "validation", "test")


def pixels(n: int = N, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 6, 6)).astype(np.uint8)


def labels(n: int = N) -> np.ndarray:
    return np.arange(n) % 3


def save_npz(place: Path, x: np.ndarray | None = None, y: np.ndarray | None = None, **others: Any) -> None:
    x = pixels() if x is None else x
    np.savez(place / "own.npz", x=x, **({"y": labels(len(x)) if y is None else y} | others))


def make_folder(place: Path) -> None:
    for i, (x, y) in enumerate(zip(pixels(), labels(), strict=True)):
        (place / "own" / f"c{y}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).save(place / "own" / f"c{y}" / f"m{i:03d}.png")


def a_file(place: Path) -> Path:
    save_npz(place)
    return place / "own.npz"


def a_folder(place: Path) -> Path:
    make_folder(place)
    return place / "own"


def trained(data: pv.Data, out: Path) -> pv.Run:
    program = pv.build("mixture", "diagonal", data, latent_dim=2, encoder="mlp:hidden=[4]", decoder="mlp:hidden=[4]",
                       likelihood="bernoulli" if data.observed_levels == 2 else "binomial")  # fmt: skip
    return pv.fit(program, data, epochs=1, batch_size=16, out=out, compile="off")


def image(place: Path, number: int) -> Path:
    return next((place / "own").glob(f"c*/m{number:03d}.*"))


def rewrite(place: Path, number: int, x: np.ndarray, suffix: str = ".png", **how: Any) -> None:
    old = image(place, number)
    old.unlink()
    Image.fromarray(x).save(old.with_suffix(suffix), **how)


def edit_spec(place: Path, old: str, new: str) -> None:
    spec = place / "run" / "spec.toml"
    assert old in spec.read_text()
    spec.write_text(spec.read_text().replace(old, new))


def edit_rows(place: Path) -> None:
    """Hand a training row to the test split, with a checksum that fits."""
    path = place / "run" / "rows.safetensors"
    tensors, state = read_tensors(path)
    for name in ("train", "digest.train"):
        other = name.replace("train", "test")
        tensors[other] = torch.cat([tensors[name][:1], tensors[other][1:]])
    write_tensors(path, tensors, state)


def one_row(x: np.ndarray, row: int, value: Any) -> np.ndarray:
    x[row] = value
    return x


Change = Callable[[Path], Any]
BACKWARDS = np.arange(N)[::-1]

# What happens to a file: a name, the change, and a word of the error, or None where the same rows are found.
FILE: list[tuple[str, Change, str | None]] = [
    ("nothing", lambda p: None, None),
    ("saved again", lambda p: save_npz(p), None),
    ("rows appended", lambda p: save_npz(p, np.concatenate([pixels(), pixels(7, seed=1)]), labels(N + 7)), None),
    ("every row twice", lambda p: save_npz(p, np.concatenate([pixels()] * 2), np.concatenate([labels()] * 2)), None),
    ("rows permuted", lambda p: save_npz(p, pixels()[BACKWARDS], labels()[BACKWARDS]), None),
    ("a row in front", lambda p: save_npz(p, np.concatenate([pixels(1, 9), pixels()]), np.r_[0, labels()]), None),
    ("a wider dtype", lambda p: save_npz(p, pixels().astype(np.int32)), None),
    ("another split asked for", lambda p: edit_spec(p, "[data]", "[data]\nvalidation = 20"), None),
    ("truncated", lambda p: save_npz(p, pixels()[:-5]), "no longer holds 5 of the 60 rows"),
    ("a row replaced", lambda p: save_npz(p, one_row(pixels(), 17, 0)), "new or changed is row 17"),
    ("a pixel changed", lambda p: save_npz(p, one_row(pixels(), (3, 2, 2), 7)), "new or changed is row 3"),
    ("other data", lambda p: save_npz(p, pixels(seed=5)), "no longer holds 60 of the 60 rows"),
    ("rotated", lambda p: save_npz(p, np.rot90(pixels(), axes=(1, 2))), "no longer holds 60"),
    ("darker", lambda p: save_npz(p, pixels() // 2), "no longer holds"),
    ("floats", lambda p: save_npz(p, pixels() / np.float32(255)), "shape of a datum was (1, 6, 6) and is now (6, 6)"),
    ("other levels", lambda p: save_npz(p, pixels() > 127), "levels was 256 and is now 2"),
    ("another shape", lambda p: save_npz(p, pixels().reshape(N, 4, 9)), "shape of a datum was (1, 6, 6)"),
    ("other labels", lambda p: save_npz(p, y=labels()[BACKWARDS]), "the labels of the train split of own.npz differ"),
    ("permuted without labels", lambda p: save_npz(p, pixels()[BACKWARDS]), "labels of the train split"),
    ("no labels", lambda p: np.savez(p / "own.npz", x=pixels()), "labels of the train split of own.npz are gone"),
    ("moved", lambda p: (p / "own.npz").rename(p / "elsewhere.npz"), "not at"),
    ("other binarization", lambda p: edit_spec(p, '"dynamic"', '"threshold"'), "binarization was dynamic"),
    ("rows edited", edit_rows, "not the file that spec.toml speaks of"),
    ("rows lost", lambda p: (p / "run" / "rows.safetensors").unlink(), "rows.safetensors is missing"),
]  # fmt: skip

FOLDER: list[tuple[str, Change, str | None]] = [
    ("added", lambda p: Image.fromarray(pixels(1, 8)[0]).save(p / "own" / "c0" / "a.png"), None),
    ("renamed", lambda p: image(p, 40).rename(image(p, 40).with_name("a.png")), None),
    ("sorted otherwise", lambda p: [f.rename(f.with_name(f"{99 - int(f.stem[1:])}.png")) for f in (p / "own").glob("*/*")], None),
    ("without loss in another format", lambda p: rewrite(p, 5, pixels()[5], ".bmp"), None),
    ("a class renamed", lambda p: (p / "own" / "c1").rename(p / "own" / "c1b"), None),
    ("removed", lambda p: image(p, 3).unlink(), "no longer holds 1 of the 60 rows"),
    ("replaced", lambda p: rewrite(p, 13, pixels(1, 8)[0]), "new or changed is 'c1/m013.png'"),
    ("rotated", lambda p: rewrite(p, 8, pixels()[8].T), "new or changed is 'c2/m008.png'"),
    ("encoded again", lambda p: rewrite(p, 6, pixels()[6], ".jpg", quality=60), "new or changed is 'c0/m006.jpg'"),
    ("in another class", lambda p: shutil.move(image(p, 9), p / "own" / "c2"), "the labels of the"),
    ("classes exchanged", lambda p: (p / "own" / "c0").rename(p / "own" / "z"), "the labels of the"),
    ("colours", lambda p: [rewrite(p, i, np.stack([pixels()[i]] * 3, -1)) for i in range(N)], "(3, 6, 6)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "change", "expected"),
    [
        pytest.param(make, change, expected, id=f"{kind}: {name}")
        for kind, make, cases in (("file", a_file, FILE), ("folder", a_folder, FOLDER))
        for name, change, expected in cases
    ],
)
def test_the_rows_that_were_trained_or_an_error(
    make: Callable[[Path], Path], change: Change, expected: str | None, tmp_path: Path
) -> None:
    data = pv.load_data(make(tmp_path), binarization="dynamic")
    trained(data, tmp_path / "run")
    change(tmp_path)
    run = pv.load(tmp_path / "run")
    if expected is not None:
        with pytest.raises(UserError) as caught:
            run.load_data()
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)
        return
    again = run.load_data()
    for split in SPLITS:
        assert torch.equal(again.stored(split), data.stored(split))
        assert torch.equal(again.observed(split), data.observed(split))  # the same draws too
        assert torch.equal(again.labels[split], data.labels[split])  # type: ignore[arg-type]
        whole = pv.load_data(run.record["data"]["name"])
        for other in SPLITS:  # the row numbers are those of the data as they are now
            of_other = whole.rows[other]
            assert of_other is not None
            both = torch.isin(again.rows[split], of_other)  # type: ignore[arg-type]
            where = torch.searchsorted(of_other, again.rows[split][both])  # type: ignore[index]
            assert torch.equal(again.stored(split)[both], whole.stored(other)[where])  # type: ignore[index]


def test_a_file_that_was_moved_is_found_in_the_folder_given(tmp_path: Path) -> None:
    data = pv.load_data(a_file(tmp_path))
    trained(data, tmp_path / "run")
    (tmp_path / "new").mkdir()
    (tmp_path / "own.npz").rename(tmp_path / "new" / "own.npz")
    run = pv.load(tmp_path / "run")
    with pytest.raises(UserError, match="--data-root"):
        run.load_data()
    assert torch.equal(run.load_data(str(tmp_path / "new")).observed("test"), data.observed("test"))
    assert (
        command(["train", "--out", str(tmp_path / "run"), "--resume", "--data-root", str(tmp_path / "new"), "--quiet"])
        == 0
    )
    with pytest.raises(UserError, match=r"nor 'own.npz' in"):
        run.load_data(str(tmp_path / "run"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "RUN", "--samples", "2"], ["report", "RUN"], ["compare", "RUN", "RUN", "--samples", "2"],
        ["posterior", "RUN", "--images", "2", "--samples", "2"], ["reconstruct", "RUN", "--num", "2"],
        ["interpolate", "RUN", "--num", "2"], ["anomaly", "RUN", "digits"], ["train", "--out", "RUN", "--resume"],
    ],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_every_command_that_loads_data_holds_them_to_the_run(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(pv.load_data(a_file(tmp_path), binarization="dynamic"), tmp_path / "run")
    before = {p.name for p in (tmp_path / "run").iterdir()}
    save_npz(tmp_path, one_row(pixels(), 17, 0))
    assert command([str(tmp_path / "run") if a == "RUN" else a for a in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "own.npz no longer holds 1 of the 60 rows" in printed.err
    assert "new or changed is row 17" in printed.err
    assert {p.name for p in (tmp_path / "run").iterdir()} == before


def test_a_run_in_memory_holds_its_data_too(tmp_path: Path) -> None:
    data = pv.load_data(a_file(tmp_path), binarization="dynamic")
    run = pv.fit(pv.build("mixture", "diagonal", data, latent_dim=2), data, epochs=1)
    assert torch.equal(run.load_data().observed("test"), data.observed("test"))
    save_npz(tmp_path, pixels(seed=3))
    with pytest.raises(UserError, match=r"the run in memory: own\.npz no longer holds 60"):
        run.load_data()


def test_resuming_with_other_rows_is_refused(tmp_path: Path) -> None:
    """Other rows of the same number and shape, in each of the three forms that data have."""
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    program = lambda: pv.build("ppca", "linear", (4,), latent_dim=2)  # noqa: E731
    for name, first, then, word in (
        ("tensor", x, x.flip(0), "the same rows stand in another order"),
        ("row", x, torch.cat([x[:9], x[:1], x[10:]]), "1 rows differ, the first is row 9"),
        ("dtype", x, x.double(), "dtype was torch.float32 and is now torch.float64"),
        ("dataset", torch.utils.data.TensorDataset(x), torch.utils.data.TensorDataset(x[:40]), "train rows was 50"),
    ):
        pv.fit(program(), first, epochs=1, out=tmp_path / name)
        pv.fit(program(), first, epochs=1, out=tmp_path / name, resume=True)
        with pytest.raises(UserError, match=word):
            pv.fit(program(), then, epochs=1, out=tmp_path / name, resume=True)
    data = pv.load_data(a_file(tmp_path), binarization="dynamic")
    trained(data, tmp_path / "run")
    save_npz(tmp_path, np.concatenate([pixels(), pixels(7, seed=1)]), labels(N + 7))
    program_ = pv.load(tmp_path / "run").program
    again = pv.load_data(tmp_path / "own.npz", binarization="dynamic")  # cut anew: a test row of before would train
    with pytest.raises(UserError, match="rows was 48 and is now"):
        pv.fit(program_, again, epochs=1, batch_size=16, out=tmp_path / "run", resume=True, compile="off")


def test_a_split_as_filed_is_held_to_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets that come with a test split: a row of it, and how many validate."""
    from pyro_vae.data import load
    from pyro_vae.data.splits import Filed

    rows, held_out = torch.from_numpy(pixels()).unsqueeze(1), torch.from_numpy(pixels(10, 4)).unsqueeze(1)
    monkeypatch.setitem(
        load.LOADERS, "mnist", lambda root: Filed("mnist", rows, 256, test=held_out, binarization="dynamic")
    )
    trained(pv.load_data("mnist"), tmp_path / "run")
    run = pv.load(tmp_path / "run")
    assert len(run.load_data().test) == 10
    held_out[3] = rows[0]
    with pytest.raises(UserError, match=r"the test split of mnist .* 1 rows differ, the first is row 3"):
        run.load_data()


def test_a_run_that_kept_row_numbers_alone(tmp_path: Path) -> None:
    """Runs of before: the row numbers stand, and a file of another length is refused."""
    data = pv.load_data(a_file(tmp_path), binarization="dynamic")
    trained(data, tmp_path / "run")
    kept = load_file(tmp_path / "run" / "rows.safetensors")
    save_file({split: kept[split] for split in SPLITS}, tmp_path / "run" / "rows.safetensors")
    text = (tmp_path / "run" / "spec.toml").read_text()
    head, _, rest = text.partition("[rows]")
    (tmp_path / "run" / "spec.toml").write_text(head + "[" + rest.partition("[")[2])
    assert torch.equal(pv.load(tmp_path / "run").load_data().observed("test"), data.observed("test"))
    save_npz(tmp_path, pixels(N + 1))
    with pytest.raises(UserError, match="has 61 rows, and had 60"):
        pv.load(tmp_path / "run").load_data()


def test_large_splits_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and last row and those between at even distances; such a split is recognised in its place only."""
    monkeypatch.setattr(content, "WHOLE_ROWS", 12)
    assert content.read_rows(1000, 36).tolist()[::11] == [0, 999]
    data = pv.load_data(a_file(tmp_path), binarization="dynamic")
    trained(data, tmp_path / "run")
    run = pv.load(tmp_path / "run")
    assert torch.equal(run.load_data().observed("test"), data.observed("test"))
    save_npz(tmp_path, pixels()[BACKWARDS], labels()[BACKWARDS])
    with pytest.raises(UserError, match="does not hold the rows that the run was trained on in their places"):
        run.load_data()


def test_digests_see_every_bit_of_a_row() -> None:
    """Each of the 800 bits of a row of 25 floats, a row's place, and no other row; two equal rows have equal digests."""
    x = torch.randn(3, 25, generator=torch.Generator().manual_seed(1))
    x[2] = x[0]
    before = content.digest_rows(x)
    assert before[0] == before[2] != before[1]
    seen = set()
    for bit in range(800):
        flipped = x.clone()
        flipped.view(torch.int32)[1, bit // 32] ^= 1 << (bit % 32) if bit % 32 < 31 else -(2**31)
        after = content.digest_rows(flipped)
        assert after[0] == before[0]
        seen.add(int(after[1]))
    assert len(seen | {int(before[1])}) == 801
