"""A newcomer's first hours with a folder of images: twenty steps in order, each with the outcome that the user sees."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from PIL import Image
from sklearn.datasets import load_digits
from typed import Typed

import pyro_vae as pv

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning"),
]
SMALL = "--encoder mlp:hidden=[64] --decoder mlp:hidden=[64] --set latent_dim=8 --compile off --quiet"


@pytest.fixture(scope="class")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder ``scans`` with one folder a digit, as a scanner's software leaves them: 8-bit PNG files."""
    where = tmp_path_factory.mktemp("images")
    bunch = load_digits()
    for i, (image, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        (where / "scans" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).round().astype(np.uint8)).save(where / "scans" / str(label) / f"{i:04}.png")
    return where


class TestFolder:
    def test_01_what_there_is_to_choose_from(self, typed: Typed) -> None:
        assert "likelihoods" in typed("list")
        assert "discretized-logistic" in typed("list likelihoods")

    def test_02_a_folder_is_trained(self, typed: Typed, folder: Path) -> None:
        typed(f"train scans --binarization dynamic --model mlp {SMALL} --epochs 30 --out runs/mlp")
        assert "validation ELBO" in typed.err
        assert (folder / "runs/mlp/weights.safetensors").is_file()

    def test_03_its_classes_are_the_sub_folders(self, typed: Typed, folder: Path) -> None:
        data = pv.load_data(folder / "scans")
        assert data.event_shape == (1, 8, 8)
        assert data.levels == 256
        assert sorted(set(data.labels["train"].tolist())) == list(range(10))

    def test_04_the_number_and_its_errors(self, typed: Typed) -> None:
        typed("evaluate runs/mlp --samples 200 --json --quiet")
        figures = json.loads(typed.out)
        assert 15 < figures["nll"] < 30  # nats: 64 fair coins are 44
        assert 0 < figures["nll_mc_se"] < figures["nll_data_se"]
        assert figures["elbo"] < -figures["nll"]
        assert figures["binarization"] == "dynamic"

    def test_05_samples_differ_from_one_another(self, typed: Typed, folder: Path) -> None:
        typed("sample runs/mlp --out samples.npy --num 100")
        x = np.load(folder / "samples.npy")
        assert x.shape == (100, 1, 8, 8)
        assert x.std(0).mean() > 0.05

    @pytest.mark.parametrize("command", ["sample", "reconstruct", "interpolate"])
    def test_06_pictures(self, typed: Typed, folder: Path, command: str) -> None:
        for kind in ("png", "svg"):
            typed(f"{command} runs/mlp --out {command}.{kind}")
        pixels = pyplot.imread(folder / f"{command}.png")
        assert pixels[..., :3].std() > 0.1
        assert "<svg" in (folder / f"{command}.svg").read_text()

    def test_07_reconstructions_are_of_their_images(self, folder: Path) -> None:
        run = pv.load(folder / "runs/mlp")
        x = run.load_data().observed("test")
        back = pv.reconstruct(run.program, x)
        own, other = ((back - t).square().mean() for t in (x, x.roll(7, 0)))
        assert own < 0.9 * other  # most of either is the coin flips of binarization

    def test_08_a_plane_of_two_latents(self, typed: Typed, folder: Path) -> None:
        typed("manifold runs/mlp --out plane.png", status=2)
        assert "--set latent_dim=2" in typed.err
        small = SMALL.replace("latent_dim=8", "latent_dim=2")
        typed(f"train scans --binarization dynamic --model mlp {small} --epochs 10 --out runs/plane")
        typed("manifold runs/plane --out plane.png")
        assert (folder / "plane.png").is_file()

    def test_09_another_prior_by_a_word(self, typed: Typed) -> None:
        options = "--binarization dynamic --model mlp --prior gaussian-mixture:components=10"
        typed(f"train scans {options} {SMALL} --epochs 30 --out runs/mixture")
        assert "trained" in typed.err

    def test_10_which_is_better_and_how_surely(self, typed: Typed) -> None:
        typed("compare runs/mlp runs/mixture runs/plane --samples 200 --quiet")
        assert "runs/plane" in typed.out
        worst = [line for line in typed.out.splitlines() if "plane" in line and "mlp" in line]
        assert worst
        assert "p" in typed.out

    def test_11_grey_levels_instead(self, typed: Typed) -> None:
        typed(f"train scans --model mlp --likelihood discretized-logistic {SMALL} --epochs 20 --out runs/grey")
        typed("evaluate runs/grey --samples 100 --json --quiet")
        figures = json.loads(typed.out)
        assert figures["bits_per_dim"] == pytest.approx(figures["nll"] / (64 * np.log(2)))
        assert 1 < figures["bits_per_dim"] < 8  # eight bits say a level without any model

    def test_12_numbers_of_other_data_are_not_compared(self, typed: Typed) -> None:
        typed("compare runs/mlp runs/grey --samples 20 --quiet", status=2)
        assert "binarization" in typed.err

    def test_13_other_images_are_surprising(self, typed: Typed, folder: Path) -> None:
        noise = (np.random.default_rng(0).random((200, 8, 8)) * 255).astype(np.uint8)
        np.save(folder / "noise.npy", noise)
        typed("anomaly runs/mlp noise.npy --samples 50 --quiet")
        assert "AUROC" in typed.out
        assert (folder / "runs/mlp/anomaly.png").is_file()

    def test_14_a_page(self, typed: Typed, folder: Path) -> None:
        typed("report runs/mlp --samples 30 --limit 60")
        page = (folder / "runs/mlp/report.html").read_text()
        assert page.count("<img") + page.count("<svg") > 8
        assert "Embedding" in page

    def test_15_a_killed_training_goes_on(self, typed: Typed, folder: Path) -> None:
        typed(f"train scans --binarization dynamic --model mlp {SMALL} --epochs 4 --out runs/whole")

        def stop(metrics: dict[str, object]) -> bool:
            return metrics["epoch"] == 2

        program = pv.build("mlp", "diagonal", pv.load_data("scans", binarization="dynamic"), latent_dim=8,
                           encoder="mlp:hidden=[64]", decoder="mlp:hidden=[64]")  # fmt: skip
        data = pv.load_data("scans", binarization="dynamic")
        pv.fit(program, data, epochs=4, compile="off", out="runs/half", callback=stop)
        typed("train --resume --out runs/half --quiet")
        whole, half = (pv.load(folder / "runs" / name).program.state_dict() for name in ("whole", "half"))
        assert all(torch.equal(t, half[name]) for name, t in whole.items())

    def test_16_labels_in_a_program_that_takes_them(self, folder: Path) -> None:
        data = pv.load_data(folder / "scans", binarization="dynamic")
        run = pv.load(folder / "runs/mlp")
        z = pv.encode(run.program, data.observed("test"))
        means = torch.stack([z[data.labels["test"] == c].mean(0) for c in range(10)])
        nearest = torch.cdist(z, means).argmin(1)
        assert (nearest == data.labels["test"]).float().mean() > 0.5  # a tenth by chance

    def test_17_an_image_of_another_size_is_named(self, typed: Typed, folder: Path) -> None:
        Image.new("L", (9, 8)).save(folder / "scans" / "3" / "odd.png")
        typed("train scans --binarization dynamic --out runs/no", status=2)
        assert "odd.png" in typed.err
        (folder / "scans" / "3" / "odd.png").unlink()

    def test_18_what_is_no_image_too(self, typed: Typed, folder: Path) -> None:
        (folder / "scans" / "3" / "broken.png").write_bytes(b"not an image")
        typed("train scans --binarization dynamic --out runs/no", status=2)
        assert "broken.png" in typed.err
        (folder / "scans" / "3" / "broken.png").unlink()

    def test_19_the_encoder_without_the_library(self, typed: Typed, folder: Path) -> None:
        typed("export runs/mlp --out exported")
        encoder = torch.export.load(folder / "exported" / "encoder.pt2").module()
        run = pv.load(folder / "runs/mlp")
        x = run.load_data().observed("test")[:5]
        assert torch.allclose(encoder(x)["z"], pv.encode(run.program, x), atol=1e-5)

    def test_20_a_run_of_another_place(self, typed: Typed, folder: Path) -> None:
        (folder / "runs/mlp").rename(folder / "thesis")
        typed("evaluate thesis --samples 20 --no-save --quiet")
        assert "| NLL" in typed.out
