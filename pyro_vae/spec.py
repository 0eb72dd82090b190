"""What a user declares, and the only place that turns a name into an object.

A model file says ``program``, ``latent_dim``, ``prior``, ``likelihood`` and ``decoder``; a guide file says
``posterior`` and ``encoder``. A program without latents is declared by itself and a likelihood, and has no guide to choose. Each
block is a name, or a name with options::

    # p(z) = sum_k w_k N(mu_k, diag s_k^2), p(x|z) = Bernoulli(f(z)).
    latent_dim = 40
    prior = { name = "gaussian-mixture", components = 100 }
    likelihood = "bernoulli"
    decoder = { name = "mlp", hidden = [500, 500] }

The same types take TOML, dicts and keyword arguments, and refuse what is misspelt with the nearest valid names.
"""

from __future__ import annotations

import functools
import math
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tomli_w
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from pyro_vae import memory, registry
from pyro_vae.blocks import Block, parse_block, table
from pyro_vae.blocks import parse_assignment as parse_assignment  # where callers look for them
from pyro_vae.blocks import read_block as read_block
from pyro_vae.data import Data
from pyro_vae.data.columned import x_alone
from pyro_vae.data.given import as_data, given
from pyro_vae.data.record import record_of
from pyro_vae.declared import find, names
from pyro_vae.errors import UserError, nearest
from pyro_vae.networks.wrapped import Wrapped
from pyro_vae.priors.base import Prior
from pyro_vae.programs.legality import require_fit
from pyro_vae.programs.vae import VAE
from pyro_vae.seeding import derive_seed, generator, seeded
from pyro_vae.signatures import checked, whole

DEFAULT_MODEL = "mixture"
DEFAULT_GUIDE = "diagonal"
SPREAD_ROWS = 1000
OF_ALL = {"program", "likelihood"}  # keys of a model that has no latents too
Shape = tuple[int, ...]


def _of(kind: str) -> BeforeValidator:
    return BeforeValidator(lambda value: parse_block(kind, value))


class _Declared(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSpec(_Declared):
    """p(z) p(x | z)."""

    program: Annotated[Block, _of("programs")] = Block(name="vae")
    latent_dim: Annotated[int, Field(ge=1, le=100_000)] = 40
    prior: Annotated[Block, _of("priors")] = Block(name="standard-normal")
    likelihood: Annotated[Block, _of("likelihoods")] = Block(name="bernoulli")
    decoder: Annotated[Block, _of("decoders")] = Block(name="mlp")

    @property
    def latents(self) -> bool:
        """Whether the program has any: it is of a likelihood alone where not, and there is no guide to choose."""
        return bool(cast(Any, registry.get("programs", self.program.name)).latents)

    @property
    def network(self) -> Block:
        """What makes x: the decoder, or a program without latents itself."""
        return self.decoder if self.latents else self.program

    def no_such(self, key: str) -> str:
        """Why a key of what is about latents is refused."""
        return f"the program {self.program.name!r} has no latents, and so no {key} to choose: leave it out"

    @model_validator(mode="after")
    def _says_what_there_is(self) -> ModelSpec:
        if not self.latents and (others := self.model_fields_set - OF_ALL):
            raise ValueError(self.no_such(min(others)))
        return self


class GuideSpec(_Declared):
    """q(z | x)."""

    posterior: Annotated[Block, _of("posteriors")] = Block(name="diagonal-normal")
    encoder: Annotated[Block, _of("encoders")] = Block(name="mlp")


class Spec(_Declared):
    """A model and a guide: all that is needed to build a program for data of a known shape."""

    model: ModelSpec = ModelSpec()
    guide: GuideSpec = GuideSpec()

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        found = self.model_dump(exclude_none=True)
        return (
            found
            if self.model.latents
            else {"model": {k: found["model"][k] for k in sorted(OF_ALL)[::-1]}, "guide": {}}
        )

    @model_validator(mode="after")
    def _has_a_guide_for_latents(self) -> Spec:
        if not self.model.latents:
            self.__dict__["guide"] = GuideSpec()  # what was declared beside it says nothing
        return self

    def to_toml(self) -> str:
        """TOML that :meth:`from_toml` reads back as the same spec."""
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Spec:
        """A validated spec from tables ``model`` and ``guide``."""
        return validated(cls, data, "the spec")

    @classmethod
    def from_toml(cls, text: str) -> Spec:
        """A validated spec from TOML."""
        return cls.from_dict(parse_toml(text, "the spec"))

    def override(self, assignments: dict[str, Any]) -> Spec:
        """A copy with dotted keys replaced: ``{"latent_dim": 10, "prior.components": 500}``."""
        data = self.to_dict()
        for key, value in assignments.items():
            head, *rest = key.split(".")
            part = "model" if head in ModelSpec.model_fields else "guide"
            if not self.model.latents and head in {*ModelSpec.model_fields, *GuideSpec.model_fields} - OF_ALL:
                raise UserError(self.model.no_such(head))
            if head not in data[part]:
                raise UserError(
                    f"unknown key {key!r}: {nearest(head, [*ModelSpec.model_fields, *GuideSpec.model_fields])}"
                )
            if not rest:
                data[part][head] = value
            elif len(rest) == 1:
                block = data[part][head]
                if not isinstance(block, (str, dict)):
                    raise UserError(f"unknown key {key!r}: {head} is a plain value, it has no options")
                data[part][head] = {**(table(block) if isinstance(block, str) else block), rest[0]: value}
            else:
                raise UserError(f"unknown key {key!r}: expected at most one dot, as in prior.components")
        return Spec.from_dict(data)


def validated(cls: type[Any], data: Any, where: str) -> Any:
    """``data`` as the pydantic type ``cls``; one :class:`UserError` line for the first thing wrong with it."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            owner: Any = cls
            for part in first["loc"][:-1]:
                owner = owner.model_fields[part].annotation
            raise UserError(
                f"{where}: unknown key {key!r}: {nearest(str(first['loc'][-1]), owner.model_fields)}"
            ) from None
        if first["type"] == "value_error":
            raise UserError(f"{where}: {first['ctx']['error']}") from None
        raise UserError(f"{where}: {key} = {first['input']!r}: {first['msg']}") from None


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """TOML as a dict, :class:`UserError` where it is none."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of too many digits is a plain ValueError
        raise UserError(f"{where} is not valid TOML: {error}") from None


def read(kind: Literal["models", "guides"], source: str | Path | dict[str, Any] | ModelSpec | GuideSpec) -> Any:
    """A :class:`ModelSpec` or :class:`GuideSpec` from a declared name, the path of a TOML file, a dict, or itself."""
    cls: type[Any] = ModelSpec if kind == "models" else GuideSpec
    if isinstance(source, cls):
        return source
    if isinstance(source, dict):
        return validated(cls, source, f"the {kind[:-1]}")
    path = find(kind, cast(Any, source))
    if path.suffix == ".py":
        raise UserError(
            f"{source} is a whole Pyro program: it holds its own guide, and is built by pyro_vae.programs.file.load"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return validated(cls, parse_toml(text, str(path)), path.name)


def declare(model: Any, guide: Any = None) -> Spec:
    """The spec of a model and a guide, each as :func:`read` takes it; of the default guide, where there is one to choose.

    Raises:
        UserError: a guide for a model without latents.
    """
    found: ModelSpec = read("models", model)
    if found.latents:
        return Spec(model=found, guide=read("guides", DEFAULT_GUIDE if guide is None else guide))
    if guide is not None:
        raise UserError(found.no_such("guide"))
    return Spec(model=found)


def declared(kind: Literal["models", "guides"]) -> list[str]:
    """The names that :func:`read` finds among the declared models or guides."""
    return names(kind)


def event_shape_of(data: Any) -> Shape:
    """The shape of one datum: of a data set of ours, a tensor ``(N, *event)``, or a tuple, which is the shape itself."""
    if isinstance(data, (tuple, list, torch.Size)):
        shape = tuple(whole("build: expected every axis of the event shape", n) for n in data)
    elif hasattr(data, "event_shape"):
        shape = tuple(data.event_shape)
    elif isinstance(data, Tensor):
        shape = tuple(data.shape[1:])
    elif hasattr(data, "__getitem__"):  # a torch Dataset
        shape = tuple(as_data(torch.utils.data.Subset(data, [0])).event_shape)
    else:
        raise UserError(f"expected data, a tensor (N, *event) or an event shape; got {type(data).__name__}")
    if not shape or math.prod(shape) < 1:
        raise UserError(f"expected events of at least one axis and one element, got shape {shape}")
    return shape


@checked
def build(
    model: str | Path | dict[str, Any] | ModelSpec = DEFAULT_MODEL,
    guide: str | Path | dict[str, Any] | GuideSpec | None = None,
    data: Any = None,
    *,
    seed: int = 0,
    **overrides: Any,
) -> VAE:
    """Build the VAE that a model and a guide declare.

    Args:
        model: a declared name, the path of a TOML file, a dict or a :class:`ModelSpec`.
        guide: likewise, or a :class:`GuideSpec`; where None, ``diagonal``, or nothing for a program without latents.
        data: what the program will describe: a data set of ours (its mean image then starts the output bias), any other data
            that ``fit`` takes, or the event shape itself.
        seed: of the initial weights; torch's generators are left as they were.
        overrides: any key of the two specs (``prior="vamp:components=500"``, ``latent_dim=10``), and for ``encoder`` and
            ``decoder`` also an ``nn.Module`` of yours that maps ``(n, *in)`` to ``(n, *features)``.

    Returns:
        A program in float32 on the CPU; ``program.spec`` is the spec (None where it holds a module of yours).

    Raises:
        UserError: an unknown or misspelt name, key or option; a network that cannot take events of this shape;
            blocks that do not fit each other.
    """
    if data is None:
        raise UserError("build needs the data, a tensor of it, or its event shape: build(model, guide, data)")
    if not (isinstance(data, (tuple, list)) and not any(hasattr(part, "__len__") for part in data)):  # a shape
        data = given(record_of(data))
    data = x_alone(data) if isinstance(data, Data) else data
    modules = {k: overrides.pop(k) for k in ("encoder", "decoder") if isinstance(overrides.get(k), nn.Module)}
    spec = declare(model, guide).override(overrides)
    if modules and not spec.model.latents:
        raise UserError(spec.model.no_such(min(modules)))
    spec = _with_levels(spec, data)
    program = construct(spec, event_shape_of(data), seed=seed, **modules)
    if hasattr(data, "mean_image"):
        real = program.likelihood.data == "real" and data.levels is None
        program.start_at(data.mean_image(), _spread(data) if real else None)
    if spec.model.latents and program.prior.start_rows and not isinstance(data, (tuple, list)):
        program.prior.start_at(_random_rows(data, program.prior.start_rows, seed))
    program.spec = None if modules else spec
    return program


def construct(
    spec: Spec, event_shape: Shape, *, seed: int = 0, encoder: nn.Module | None = None, decoder: nn.Module | None = None
) -> VAE:
    """The program of a validated spec for events of a given shape.

    Raises:
        UserError: blocks that do not fit, or a program that would take more memory than is free, before it takes any.
    """
    if encoder is None and decoder is None:
        memory.require_for(outline(spec, event_shape))
    with seeded(derive_seed("initial weights", seed)):
        return _assemble(spec, event_shape, encoder, decoder)


def outline(spec: Spec, event_shape: Shape) -> VAE:
    """The program on the ``meta`` device: every name, shape and dtype, and no memory."""
    try:
        with torch.device("meta"):
            return _assemble(spec, event_shape, None, None)
    except (RuntimeError, TypeError) as error:  # torch has no one exception for more elements than 64 bits count
        if "overflow" not in str(error).lower():
            raise
        raise UserError(
            "the declared model has a tensor of more elements than 64 bits count: make it smaller"
        ) from None


def _assemble(spec: Spec, event_shape: Shape, encoder: nn.Module | None, decoder: nn.Module | None) -> VAE:
    def make(kind: str, block: Block, *shapes: Shape) -> Any:
        return registry.get(kind, block.name)(*shapes, **registry.validate(kind, block.name, block.options))

    family = cast(type[Prior], registry.get("priors", spec.model.prior.name))
    latent_shape = family.latent_shape_of(spec.model.latent_dim, **spec.model.prior.options)
    options = registry.validate("programs", spec.model.program.name, spec.model.program.options)
    if not spec.model.latents:
        of_a_place = functools.partial(make, "likelihoods", spec.model.likelihood)
        return cast(Any, registry.get("programs", spec.model.program.name))(event_shape, of_a_place, **options)
    program = cast(type[VAE], registry.get("programs", spec.model.program.name))
    told = {"event_shape": event_shape, **options}
    decoded = program.decoder_shape(latent_shape, **told)
    enc = Wrapped(event_shape, encoder) if encoder is not None else make("encoders", spec.guide.encoder, event_shape)
    posterior = make("posteriors", spec.guide.posterior, program.features_shape(enc.out_shape, **told), latent_shape)
    prior = make("priors", spec.model.prior, latent_shape, *([event_shape] if family.needs_event_shape else []))
    dec = (
        Wrapped(decoded, decoder) if decoder is not None else make("decoders", spec.model.decoder, decoded, event_shape)
    )
    likelihood = make("likelihoods", spec.model.likelihood, dec.out_shape, event_shape)
    require_fit(prior, posterior)
    return program(prior, dec, likelihood, enc, posterior, **options)


def _with_levels(spec: Spec, data: Any) -> Spec:
    """The spec with the data's number of levels written into a likelihood that has such an option and was not told."""
    likelihood, levels = spec.model.likelihood, getattr(data, "observed_levels", None)
    takes = "levels" in registry.schema("likelihoods", likelihood.name).model_fields
    return (
        spec.override({"likelihood.levels": levels})
        if takes and levels and "levels" not in likelihood.options
        else spec
    )


def _random_rows(data: Any, count: int, seed: int) -> Tensor:
    """``count`` random rows of training data as a program sees them, with repeats where there are fewer."""
    stored = data.train if hasattr(data, "train") else data
    rows = torch.cat(
        [
            torch.randperm(len(stored), generator=generator("pseudo-inputs", seed, k))
            for k in range(-(-count // len(stored)))
        ]
    )
    if not hasattr(data, "observed"):
        return stored[rows[:count]]
    return cast(Tensor, data.observed("train", seed=seed, rows=rows[:count]))


def _spread(data: Any) -> float:
    """The typical standard deviation of an entry over the training rows, of which a thousand are read."""
    count = min(len(data.train), SPREAD_ROWS)
    rows = data.train[torch.arange(count) * len(data.train) // count].double()
    spread = float((rows - rows.nanmean(0)).square().nanmean(0).nanmean().sqrt())
    return spread if 0 < spread < math.inf else 1.0
