"""Specs: the same program from TOML, dicts, keywords and the command line; mistakes are named in one line."""

from __future__ import annotations

import random
import typing
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae import registry
from pyro_vae.declared import find, folder, heading
from pyro_vae.errors import UserError
from pyro_vae.seeding import seeded
from pyro_vae.spec import Block, GuideSpec, ModelSpec, Spec, declared, parse_assignment, parse_block, read

MODELS = [name for name in declared("models") if find("models", name).suffix == ".toml"]
GUIDES = [name for name in declared("guides") if find("guides", name).suffix == ".toml"]


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(torch.equal(x[n], y[n]) for n in x)


# Spec -> TOML -> spec


@pytest.mark.parametrize("model", MODELS)
def test_declared_specs_survive_toml(model: str) -> None:
    for guide in GUIDES:
        spec = Spec(model=read("models", model), guide=read("guides", guide))
        assert Spec.from_toml(spec.to_toml()) == spec
        assert Spec.from_dict(spec.to_dict()) == spec
        assert Spec.from_toml(spec.to_toml()).to_toml() == spec.to_toml()


def value_of(annotation: Any, field: Any, rng: random.Random) -> Any:
    """Some valid value of an option's type."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return value_of(arguments[0], field, rng)
    if origin is typing.Literal:
        return rng.choice(arguments)
    if origin is list:
        return [rng.randint(1, 99) for _ in range(rng.randint(1, 3))]
    if arguments:
        return value_of(rng.choice([a for a in arguments if a is not type(None)]), field, rng)
    return {bool: rng.random() < 0.5, int: rng.randint(2, 64), float: rng.uniform(0.05, 0.9)}.get(annotation)


def random_block(kind: str, rng: random.Random) -> dict[str, Any] | str:
    """A registered name with a random selection of random options; drawn again where they are refused."""
    while True:
        name = rng.choice(registry.names(kind))
        options = {}
        for key, field in registry.schema(kind, name).model_fields.items():
            value = value_of(field.annotation, field, rng)
            if value is not None and (field.is_required() or rng.random() < 0.5):
                options[key] = value
        try:
            registry.validate(kind, name, options)
        except UserError:
            continue
        return {"name": name, **options} if options else name


@pytest.mark.parametrize("seed", range(40))
def test_random_specs_survive_toml(seed: int) -> None:
    rng = random.Random(seed)
    spec = Spec.from_dict(
        {
            "model": {
                "latent_dim": rng.randint(1, 100),
                **{k: random_block(k + "s", rng) for k in ("prior", "likelihood", "decoder")},
            },
            "guide": {k: random_block(k + "s", rng) for k in ("posterior", "encoder")},
        }
    )
    assert Spec.from_toml(spec.to_toml()) == spec
    for kind, block in (
        ("priors", spec.model.prior),
        ("likelihoods", spec.model.likelihood),
        ("encoders", spec.guide.encoder),
    ):
        assert parse_block(kind, str(block)) == block


def test_every_declared_file_opens_with_its_mathematics() -> None:
    for kind in ("models", "guides"):
        for name in declared(kind):
            line = heading(find(kind, name))
            assert ("p(" in line) if kind == "models" else ("q(" in line), name
            assert "http" in find(kind, name).read_text(), name


def test_names_are_found_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read("models", "mixture") == read("models", folder("models") / "mixture.toml")
    (tmp_path / "mixture.toml").write_text("latent_dim = 7")
    assert read("models", "mixture").latent_dim == 40  # a name means what is declared
    assert read("models", "./mixture.toml").latent_dim == read("models", tmp_path / "mixture.toml").latent_dim == 7


# The same program, however it is said


def test_every_way_to_say_it_builds_the_same_program(tmp_path: Path) -> None:
    model = {
        "program": "vae",
        "latent_dim": 3,
        "prior": {"name": "gaussian-mixture", "components": 4, "spread": 2.0},
        "likelihood": {"name": "normal", "scale": "per-pixel"},
        "decoder": {"name": "mlp", "hidden": [8, 9], "activation": "tanh"},
    }
    guide = {"posterior": "diagonal-normal", "encoder": {"name": "gated-mlp", "hidden": [7]}}
    (tmp_path / "m.toml").write_text(tomli_w.dumps(model))
    (tmp_path / "g.toml").write_text(tomli_w.dumps(guide))
    shape = (1, 4, 4)
    reference = pv.build(model, guide, shape, seed=3)
    spec = Spec.from_dict({"model": model, "guide": guide})
    strings = {
        "latent_dim": 3,
        "prior": "gaussian-mixture:components=4,spread=2.0",
        "likelihood": "normal:scale=per-pixel",
        "decoder": "mlp:hidden=[8, 9],activation=tanh",
        "posterior": "diagonal-normal",
        "encoder": "gated-mlp:hidden=[7]",
    }
    assignments = dict(
        parse_assignment(text)
        for text in (
            "latent_dim=3", "prior=gaussian-mixture", "prior.components=4", "prior.spread=2.0",
            "likelihood=normal",
            "likelihood.scale=per-pixel", "decoder.hidden=[8, 9]", "decoder.activation=tanh", "encoder=gated-mlp",
            "encoder.hidden=[7]",
        )
    )  # fmt: skip
    ways = {
        "files": pv.build(tmp_path / "m.toml", str(tmp_path / "g.toml"), shape, seed=3),
        "specs": pv.build(spec.model, spec.guide, shape, seed=3),
        "keywords": pv.build("mlp", "diagonal", shape, seed=3, **{**model, **guide}),
        "strings": pv.build("ppca", "gated", shape, seed=3, **strings),
        "--set": pv.build(Spec().override(assignments).model, Spec().override(assignments).guide, shape, seed=3),
        "a tensor": pv.build(model, guide, torch.zeros(5, *shape), seed=3),
    }
    for name, program in ways.items():
        assert same(program, reference), name
        assert program.spec == spec, name
    assert not same(pv.build(model, guide, shape, seed=4), reference)


def test_strings_with_options_take_more_of_them() -> None:
    spec = Spec().override({"prior": "gaussian-mixture:components=4", "prior.spread": 2.0})
    assert spec.model.prior == Block(name="gaussian-mixture", options={"components": 4, "spread": 2.0})


def test_a_network_of_the_users_own() -> None:
    with seeded(0):
        encoder, decoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)), nn.Linear(3, 6)
    vae = pv.build("mlp", "diagonal", (1, 4, 4), latent_dim=3, encoder=encoder, decoder=decoder)
    assert vae.spec is None
    assert (vae.encoder.out_shape, vae.decoder.out_shape) == ((5,), (6,))
    assert pv.reconstruct(vae, torch.zeros(2, 1, 4, 4)).shape == (2, 1, 4, 4)
    assert encoder.training
    with pytest.raises(UserError, match=r"does not take a batch of shape \(2, 1, 5, 5\)"):
        pv.build("mlp", "diagonal", (1, 5, 5), encoder=encoder)
    with pytest.raises(UserError, match="must return one tensor"):
        pv.build("mlp", "diagonal", (4,), encoder=nn.Flatten(0))


def test_the_bias_starts_at_the_mean_image() -> None:
    data = pv.load_data("digits")
    vae = pv.build("mlp", "diagonal", data)
    start = vae.likelihood.head.map.bias.detach().sigmoid().reshape(data.event_shape)
    torch.testing.assert_close(start, data.mean_image().clamp(1e-3, 1 - 1e-3))


# Mistakes


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pv.build("mixtrue", "diagonal", (4,)), ["unknown model 'mixtrue'", "did you mean 'mixture'"]),
        (lambda: pv.build("mlp", "diagnal", (4,)), ["unknown guide 'diagnal'", "did you mean 'diagonal'"]),
        (lambda: pv.build("mlp", "diagonal", (4,), prio="vamp"), ["unknown key 'prio'", "did you mean 'prior'"]),
        (lambda: pv.build("mlp", "diagonal", (4,), prior="standard_normal"), ["unknown prior", "did you mean 'standard-normal'"]),
        (lambda: pv.build("mlp", "diagonal", (4,), prior=3), ["expected a name", "3"]),
        (lambda: pv.build("mlp", "diagonal", (4,), prior={"components": 3}), ["a table with a name"]),
        (lambda: pv.build("mlp", "diagonal", (4,), prior="gaussian-mixture:componets=3"), ["'components'?"]),
        (lambda: pv.build("mlp", "diagonal", (4,), prior="standard-normal:scale=3"), ["no option 'scale'", "it has no options"]),
        (lambda: pv.build("mlp", "diagonal", (4,), decoder="mlp:activation=rleu"), ["activation = 'rleu'"]),
        (lambda: pv.build("mlp", "diagonal", (4,), decoder="mlp:hidden=[]"), ["hidden"]),
        (lambda: pv.build("mlp", "diagonal", (4,), latent_dim="many"), ["latent_dim = 'many'"]),
        (lambda: pv.build("mlp", "diagonal", (4,), latent_dim=0), ["latent_dim = 0"]),
        (lambda: pv.build("mlp", "diagonal"), ["build needs the data"]),
        (lambda: pv.build("mlp", "diagonal", ()), ["at least one axis"]),
        (lambda: pv.build("mlp", "diagonal", (0, 3)), ["(0, 3)"]),
        (lambda: pv.build({"latent_dimm": 3}, "diagonal", (4,)), ["the model", "'latent_dimm'", "did you mean 'latent_dim'"]),
        (lambda: pv.build("mlp", {"encodr": "mlp"}, (4,)), ["the guide", "'encodr'", "did you mean 'encoder'"]),
        (lambda: Spec.from_toml("[model]\nlatent_dim = 3\n[gude]\n"), ["unknown key 'gude'", "did you mean 'guide'"]),
        (lambda: Spec.from_toml("[model]\npriro = 'a'"), ["unknown key 'model.priro'", "did you mean 'prior'"]),
        (lambda: Spec.from_toml("[model"), ["not valid TOML"]),
        (lambda: Spec().override({"prior.spread.more": 1}), ["at most one dot"]),
        (lambda: Spec().override({"latent_dim.more": 1}), ["it has no options"]),
        (lambda: parse_assignment("novalue"), ["expected key=value, got 'novalue'"]),
        (lambda: parse_assignment("=3"), ["expected key=value"]),
        (lambda: registry.names("prior"), ["unknown kind 'prior'", "did you mean 'priors'"]),
        (lambda: read("models", "no/such.toml"), ["no model file 'no/such.toml'"]),
        (lambda: read("models", "notes.txt"), ["notes.txt"]),
    ],
)  # fmt: skip
def test_mistakes_are_named_in_one_line(call: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    for word in words:
        assert word in message, (word, message)


def test_supports_must_agree() -> None:
    for prior in registry.names("priors"):
        for posterior in registry.names("posteriors"):
            a: Any = registry.get("priors", prior)
            b: Any = registry.get("posteriors", posterior)
            if a.support is not None and repr(a.support) != repr(b.support):
                with pytest.raises(UserError, match=rf"{posterior}.*choose"):
                    pv.build("mlp", "diagonal", (4,), latent_dim=3, prior=prior, posterior=posterior)


def test_specs_are_frozen() -> None:
    spec = Spec()
    with pytest.raises(ValueError, match="frozen"):
        spec.model.latent_dim = 3
    assert (ModelSpec(), GuideSpec()) == (spec.model, spec.guide)
