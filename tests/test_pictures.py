"""Pictures: what is drawn, the quantiles of the prior, and the files they are written to."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.optimize import brentq
from scipy.stats import norm
from torch import nn

import pyro_vae as pv
from pyro_vae.analysis import describe, drawing, pictures
from pyro_vae.analysis.manifold import latent_grid
from pyro_vae.analysis.source import python_source
from pyro_vae.declared import names
from pyro_vae.errors import UserError
from pyro_vae.programs.labels import needs_y
from pyro_vae.programs.trace import draw_terms
from pyro_vae.seeding import derive_seed, seeded
from pyro_vae.spec import Spec, construct, read


class HandWritten(nn.Module):
    """A program that is no VAE: any prior over z, an optional second latent, and a linear decoder."""

    def __init__(self, prior, event_shape=(1, 4, 4), second=False):
        super().__init__()
        self.prior, self.event_shape, self.second = prior, event_shape, second
        with seeded(0):
            self.decoder = nn.Linear(prior.event_shape.numel(), int(np.prod(event_shape)))

    def model(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", self.prior)
            mean = self.decoder(z.flatten(-len(self.prior.event_shape)).float())
            if self.second:
                mean = mean + pyro.sample("w", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            mean = mean.reshape(*mean.shape[:-1], *self.event_shape)
            pyro.sample("x", dist.Normal(mean, 0.1).to_event(len(self.event_shape)), obs=x)

    def guide(self, x):
        flat = x.flatten(1)
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Normal(flat[:, : self.prior.event_shape.numel()], 0.1).to_event(1))
            if self.second:
                pyro.sample("w", dist.Normal(flat[:, -1:], 0.1).to_event(1))


NORMAL_2D = dist.Normal(torch.zeros(2), 1.0).to_event(1)


@pytest.fixture(scope="module")
def vae():
    return pv.build("mlp", "diagonal", (1, 8, 8), latent_dim=2, decoder="mlp:hidden=[8]", encoder="mlp:hidden=[8]")


@pytest.fixture
def drawn(monkeypatch):
    """The arguments of the call of image_grid behind a picture."""
    calls = []
    monkeypatch.setattr(pictures, "image_grid", lambda *a, **k: calls.append((a, k)) or drawing.image_grid(*a, **k))
    return calls


def opened(path):
    """A picture from a file, as RGB."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.convert("RGB")


def pixels(ax):
    return np.asarray(ax.get_images()[0].get_array())


@pytest.mark.parametrize(
    ("shape", "ncols"), [((7, 5, 6), None), ((7, 1, 5, 6), 1), ((7, 3, 5, 6), 3), ((7, 3, 5, 6), 50)]
)
def test_image_grid_shows_each_pixel_as_it_is(shape, ncols):
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    shown = pixels(pictures.image_grid(images, ncols)).reshape(-1, 3)
    expected = images.reshape(7, -1, 5, 6).expand(7, 3, 5, 6).permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    frame = {tuple(np.float32(drawing.FRAME)), tuple(np.float32(drawing.PAPER))}
    assert {tuple(c) for c in shown} - frame == {tuple(c) for c in expected}


def test_image_grid_clips_floats_and_scales_levels():
    floats = pixels(pictures.image_grid(torch.tensor([[[-3.0, 0.5], [1.0, 9.0]]])))
    levels = pixels(pictures.image_grid(torch.tensor([[[0, 255], [51, 255]]], dtype=torch.uint8)))
    assert floats.min() == 0
    assert floats.max() == 1
    assert {0.0, 0.2, 1.0} <= {round(float(v), 6) for v in levels.ravel()}


def test_a_written_picture_is_sharp(tmp_path):
    images = (torch.rand(12, 28, 28, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    path = pictures.save(pictures.image_grid(images, 4), tmp_path / "a.png")
    colours = opened(path).getcolors(2**24)
    assert len(colours) == 3  # black, white and the frame: no pixel is blurred


def test_image_grid_of_nan_is_left_empty():
    images = torch.zeros(4, 2, 2)
    images[3] = torch.nan
    shown = pixels(pictures.image_grid(images, 2))
    assert not np.isnan(shown).any()
    assert (shown[-1, -1] == drawing.PAPER).all()


@pytest.mark.parametrize(
    "images", [torch.zeros(0, 3, 3), torch.zeros(3, 3), torch.zeros(2, 4, 3, 3), np.zeros((2, 2, 3, 3))]
)
def test_image_grid_refuses_what_is_no_image(images):
    with pytest.raises(UserError, match="expected at least one image"):
        pictures.image_grid(images)


def test_pictures_are_drawn_where_they_are_told(vae):
    ax = Figure().add_subplot()
    x = torch.zeros(4, 1, 8, 8)
    for draw in (
        lambda: pictures.samples(vae, 4, ax=ax),
        lambda: pictures.reconstructions(vae, x, ax=ax),
        lambda: pictures.interpolations(vae, x, ax=ax),
        lambda: pictures.manifold(vae, 3, ax=ax),
        lambda: pictures.training_curves([{"epoch": 1, "train_loss": 1.0}], ax=ax),
    ):
        assert draw() is ax


def test_samples_are_means_or_draws_and_come_back_by_seed(vae, drawn):
    state = torch.get_rng_state()
    for seed, mean in ((0, True), (0, True), (1, True), (0, False)):
        pictures.samples(vae, 9, seed, mean)
    assert torch.equal(state, torch.get_rng_state())
    first, again, other, draws = (a[0] for a, _ in drawn)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert ((first > 0) & (first < 1)).all()


def test_data_stand_above_their_reconstructions(vae, drawn):
    x = torch.rand(13, 1, 8, 8, generator=torch.Generator().manual_seed(0)).round()
    pictures.reconstructions(vae, x)
    (rows, ncols), options = drawn[0][0][:2], drawn[0][1]
    rows = rows.reshape(4, 10, 1, 8, 8)
    assert ncols == 10
    assert list(options["wide_rows"]) == [2]
    assert torch.equal(rows[[0, 2]].flatten(0, 1)[:13], x)
    assert torch.equal(rows[[1, 3]].flatten(0, 1)[:13], pv.reconstruct(vae, x))
    assert rows[2:, 3:].isnan().all()


def test_interpolations_go_from_one_reconstruction_to_the_other(vae, drawn):
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)).round()
    pictures.interpolations(vae, x, steps=5)
    pictures.interpolations(vae, (x[:3], x[3:]), steps=5)
    rows = drawn[0][0][0].reshape(3, 7, 1, 8, 8)
    assert torch.equal(drawn[0][0][0], drawn[1][0][0])
    assert torch.equal(rows[:, 0], x[:3])
    assert torch.equal(rows[:, -1], x[3:])
    torch.testing.assert_close(rows[:, [1, 5]].transpose(0, 1).flatten(0, 1), pv.reconstruct(vae, x))
    z = pv.encode(vae, x)
    torch.testing.assert_close(rows[:, 3], pv.decode(vae, (z[:3] + z[3:]) / 2))


def test_every_latent_is_interpolated(drawn):
    program = HandWritten(NORMAL_2D, second=True)
    x = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    pictures.interpolations(program, x, steps=3)
    middle = drawn[0][0][0].reshape(1, 5, 1, 4, 4)[:, 2]
    z = pv.encode(program, x)
    assert set(z) == {"z", "w"}
    torch.testing.assert_close(middle, pv.decode(program, {k: v.mean(0, keepdim=True) for k, v in z.items()}))


@pytest.mark.parametrize(("rows", "steps", "message"), [(3, 10, "pairs"), (0, 10, "pairs"), (2, 1, "2 steps")])
def test_interpolations_need_pairs_and_steps(vae, rows, steps, message):
    with pytest.raises(UserError, match=message):
        pictures.interpolations(vae, torch.zeros(rows, 1, 8, 8), steps=steps)


def test_interpolations_of_a_discrete_latent_are_refused():
    program = HandWritten(dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
    with pytest.raises(UserError, match="'z' is discrete"):
        pictures.interpolations(program, torch.zeros(2, 1, 4, 4))


def test_the_manifold_runs_to_the_right_and_upwards(drawn):
    program = HandWritten(NORMAL_2D)
    with torch.no_grad():
        program.decoder.weight.zero_()[:2] = torch.eye(2)
        program.decoder.bias.zero_()
    pictures.manifold(program, 3)
    corner = drawn[0][0][0].reshape(3, 3, 16)[..., :2]
    assert (corner[0, 2] > 0.9).all()  # top right: both large
    assert corner[0, 0, 0] < -0.9 < 0.9 < corner[0, 0, 1]


def test_quantiles_of_the_standard_normal(vae):
    q = norm.ppf((np.arange(7) + 0.5) / 7)
    grid = latent_grid(vae, 7).numpy()
    np.testing.assert_allclose(grid, np.stack(np.meshgrid(q, q), -1), atol=1e-6)


def test_quantiles_of_a_mixture_by_its_closed_form():
    vae = pv.build("mlp", "diagonal", (1, 8, 8), latent_dim=2, prior="gaussian-mixture:components=4,spread=4.0")
    with torch.no_grad():
        vae.prior.raw_scale.copy_(torch.linspace(-2, 1, 8).reshape(4, 2))
        vae.prior.logits.copy_(torch.tensor([0.0, 1.0, -1.0, 0.5]))
    p = vae.prior(torch.zeros(1, 1, 8, 8))
    w, loc, scale = (t.detach().double().numpy() for t in (p.logits.softmax(0), p.loc, p.scale))
    u = (np.arange(6) + 0.5) / 6
    z = latent_grid(vae, 6).double().numpy()
    for j, uj in enumerate(u):
        exact = brentq(lambda t, uj=uj: w @ norm.cdf(t, loc[:, 0], scale[:, 0]) - uj, -40, 40)
        assert abs(z[0, j, 0] - exact) < 0.02
        given = w * norm.pdf(z[0, j, 0], loc[:, 0], scale[:, 0])
        u2 = [(given / given.sum()) @ norm.cdf(t, loc[:, 1], scale[:, 1]) for t in z[:, j, 1]]
        np.testing.assert_allclose(u2, u, atol=2e-3)


def test_quantiles_of_a_correlated_prior_of_a_program_that_is_no_vae():
    rho = 0.9
    prior = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, rho], [rho, 1.0]]))
    z = latent_grid(HandWritten(prior), 9).double().numpy()
    q = norm.ppf((np.arange(9) + 0.5) / 9)
    np.testing.assert_allclose(z[0, :, 0], q, atol=5e-3)
    np.testing.assert_allclose(z[..., 1], rho * z[..., 0] + np.sqrt(1 - rho**2) * q[:, None], atol=5e-3)


def test_quantiles_stay_in_a_bounded_support():
    prior = dist.Beta(torch.tensor([0.5, 2.0]), torch.tensor([0.5, 1.0])).to_event(1)
    z = latent_grid(HandWritten(prior), 8)
    assert ((z > 0) & (z < 1)).all()
    torch.testing.assert_close(z[:, 0, 1], ((torch.arange(8) + 0.5) / 8).sqrt(), atol=5e-3, rtol=0)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (HandWritten(dist.Normal(torch.zeros(3), 1.0).to_event(1)), "'z' of dimension 3"),
        (HandWritten(NORMAL_2D, second=True), "'z' of dimension 2 and 'w' of dimension 1"),
        (HandWritten(dist.Bernoulli(torch.full((2,), 0.5)).to_event(1)), "discrete"),
        (HandWritten(dist.Delta(torch.zeros(2)).to_event(1)), "no density"),
    ],
    ids=["three", "two sites", "discrete", "no density"],
)
def test_a_manifold_of_another_latent_space_is_refused(program, message):
    with pytest.raises(UserError, match=message):
        pictures.manifold(program)


@pytest.mark.parametrize("shape", [(2,), (5,), (6, 6), (3, 6, 6)])
def test_every_shape_of_data_is_drawn(shape, tmp_path):
    program = pv.build("ppca", "linear", shape, latent_dim=2)
    x = torch.randn(6, *shape, generator=torch.Generator().manual_seed(0))
    for i, ax in enumerate(
        (
            pictures.samples(program),
            pictures.samples(program, mean=False),
            pictures.reconstructions(program, x),
            pictures.interpolations(program, x, steps=4),
            pictures.manifold(program, 4),
        )
    ):
        path = pictures.save(ax, tmp_path / f"{i}.png")
        assert opened(path).size[0] > 300
    assert len(list(tmp_path.iterdir())) == 5


def test_data_that_cannot_be_drawn_are_refused():
    program = pv.build("ppca", "linear", (2, 5, 5), latent_dim=2)
    for draw in (
        lambda: pictures.samples(program),
        lambda: pictures.manifold(program),
        lambda: pictures.reconstructions(program, torch.zeros(1, 2, 5, 5)),
        lambda: pictures.interpolations(program, torch.zeros(2, 2, 5, 5)),
    ):
        with pytest.raises(UserError, match=r"no picture for data of shape \(2, 5, 5\)"):
            draw()


def test_training_curves_show_what_was_measured():
    metrics = [{"epoch": e, "train_loss": 100.0 / e, "validation_loss": 101.0 / e} for e in range(1, 31)]
    ax = pictures.training_curves(metrics)
    train, validation, best = ax.get_lines()
    assert list(train.get_ydata()) == [-m["train_loss"] for m in metrics]
    assert list(validation.get_ydata()) == [-m["validation_loss"] for m in metrics]
    assert (best.get_xdata()[0], best.get_ydata()[0]) == (30, -101.0 / 30)
    assert len(pictures.training_curves([{"epoch": 1, "train_loss": 1.0}]).get_lines()) == 1
    with pytest.raises(UserError, match="no metrics"):
        pictures.training_curves([])


def test_save_replaces_a_file_whole_and_refuses_other_places(tmp_path):
    ax = pictures.image_grid(torch.zeros(1, 2, 2))
    path = tmp_path / "a.png"
    path.write_text("old")
    assert pictures.save(ax.figure, path) == path
    opened(path)
    (tmp_path / "folder.png").mkdir()
    for name, message in (
        ("a.tiff", "ends in .png"),
        ("a", "ends in .png"),
        ("no/a.png", "no directory"),
        ("folder.png", "is a directory"),
    ):
        with pytest.raises(UserError, match=message):
            pictures.save(ax, tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "folder.png"]


def test_pyplot_and_its_settings_are_left_alone(python):
    code = (
        "import sys, torch, matplotlib\n"
        "before = dict(dict.items(matplotlib.rcParams))\n"
        "from pyro_vae.analysis import pictures\n"
        "pictures.image_grid(torch.zeros(2, 4, 4)).figure.canvas.draw()\n"
        "pictures.training_curves([{'epoch': 1, 'train_loss': 1.0}]).figure.canvas.draw()\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert dict(dict.items(matplotlib.rcParams)) == before"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr


def test_sites_and_parameters_are_described():
    program = HandWritten(NORMAL_2D, second=True)
    found = {(s.part, s.name): s for s in describe.sites(program)}
    assert list(found) == [("model", "z"), ("model", "w"), ("model", "x"), ("guide", "z"), ("guide", "w")]
    assert found["model", "x"].role == "observed"
    assert found["model", "x"].event_shape == (1, 4, 4)
    assert found["guide", "w"].distribution == "Normal"
    assert describe.total(describe.parameters(program)) == 2 * 16 + 16
    program.decoder.bias.requires_grad_(False)
    assert describe.total(describe.parameters(program)) == 2 * 16


TOML_MODELS = [n for n in names("models") if pv.spec.find("models", n).suffix == ".toml"]
TOML_GUIDES = [n for n in names("guides") if pv.spec.find("guides", n).suffix == ".toml"]


def first_that_fits(pairs):
    """The program of the first pair that is not refused."""
    for model, guide in pairs:
        spec = Spec(model=read("models", model), guide=read("guides", guide))
        spec = spec.override({"latent_dim": 3}) if spec.model.latents else spec
        try:
            return spec, construct(spec, (1, 8, 8), seed=0)
        except UserError as error:
            refused = error
    raise refused


@pytest.mark.parametrize(
    "pairs",
    [[(m, g) for g in ["diagonal", *TOML_GUIDES]] for m in TOML_MODELS]
    + [[(m, g) for m in ["mlp", *TOML_MODELS]] for g in TOML_GUIDES],
    ids=[*TOML_MODELS, *(f"guide-{g}" for g in TOML_GUIDES)],
)
def test_the_printed_python_is_the_program(pairs):
    spec, built = first_that_fits(pairs)
    pasted: dict = {"__name__": "pasted"}
    with seeded(derive_seed("initial weights", 0)):
        exec(python_source(spec, (1, 8, 8)), pasted)
    program = pasted["program"]
    state, own = built.state_dict(), program.state_dict()
    assert {n: v.shape for n, v in own.items()} == {n: v.shape for n, v in state.items()}
    assert all(torch.equal(own[n], state[n]) for n in state)  # the same seed gives the same weights
    moved = {n: v + 0.01 * torch.randn(v.shape, generator=torch.Generator().manual_seed(1)) for n, v in state.items()}
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(2)).round()
    y = torch.arange(4) if needs_y(built) else None
    weights = []
    for p in (built, program):
        p.load_state_dict(moved)
        with seeded(3), torch.no_grad():
            weights.append(draw_terms(p, x, y, num_samples=2).log_weight)
    assert torch.equal(*weights)
