"""The plain Pyro program that a declared model and guide stand for, as Python that can be pasted and run."""

from __future__ import annotations

import ast
import builtins
import inspect
import sys
import textwrap
from typing import Any

from pyro_vae import registry
from pyro_vae.programs.vae import VAE
from pyro_vae.spec import Block, Spec, construct

Shape = tuple[int, ...]


def python_source(spec: Spec, event_shape: Shape, headings: tuple[str, ...] = ()) -> str:
    """A class with ``model(x)`` and ``guide(x)`` that is the program of a spec, block for block and name for name.

    Executed, it defines ``program`` with the parameters of ``pyro_vae.spec.construct(spec, event_shape)``; under
    ``torch.manual_seed(derive_seed("initial weights", 0))`` with the values that it has there (a program built on data starts its
    output bias at their mean image besides).

    Args:
        spec: a model and a guide.
        event_shape: of one datum.
        headings: lines of comment to begin with.

    Returns:
        The source, without a newline at its end.

    Example:
        >>> print(python_source(Spec(), (1, 8, 8)).splitlines()[2])
        import pyro
    """
    if not spec.model.latents:
        return _of_a_likelihood(spec, event_shape, headings)
    built: Any = construct(spec, event_shape)
    latent: Shape = built.prior.latent_shape
    program = registry.get("programs", spec.model.program.name)
    own = registry.validate("programs", spec.model.program.name, spec.model.program.options)
    told: dict[str, Any] = {"event_shape": event_shape, **own}
    decoded, features = program.decoder_shape(latent, **told), program.features_shape(built.encoder.out_shape, **told)  # type: ignore[attr-defined]
    # in the order in which spec.construct draws their initial weights
    blocks: list[tuple[str, str, Block, tuple[Shape, ...]]] = [
        ("encoder", "encoders", spec.guide.encoder, (event_shape,)),
        ("posterior", "posteriors", spec.guide.posterior, (features, latent)),
        ("prior", "priors", spec.model.prior, (latent, event_shape) if built.prior.needs_event_shape else (latent,)),
        ("decoder", "decoders", spec.model.decoder, (decoded, event_shape)),
        ("likelihood", "likelihoods", spec.model.likelihood, (built.decoder.out_shape, event_shape)),
    ]
    written = (
        program is VAE
    )  # whose model and guide are printed whole; any other program is imported, and made of its blocks
    methods = {n: textwrap.dedent(inspect.getsource(f)) for n, f in vars(VAE).items() if _is_own_method(n, f)}
    imports = {_import_line(name, VAE) for name in _globals_of(methods.values())}
    lines = ["super().__init__()", f"self.event_shape = {event_shape!r}"] if written else []
    classes = [registry.get(kind, block.name) for _, kind, block, _ in blocks]
    for cls, (attribute, kind, block, shapes) in zip(classes, blocks, strict=True):
        # a Bernoulli prior, posterior and likelihood have one name between them
        shared = len({c for c in classes if c.__name__ == cls.__name__}) > 1
        name = cls.__name__ + attribute.capitalize() if shared else cls.__name__
        imports.add(f"from {cls.__module__} import {cls.__name__}" + (f" as {name}" if shared else ""))
        options = registry.validate(kind, block.name, block.options)
        arguments = [*(repr(s) for s in shapes), *(f"{k}={v!r}" for k, v in options.items())]
        lines.append(f"{'self.' * written}{attribute} = {name}({', '.join(arguments)})")
    if not written:
        imports -= {_import_line(n, VAE) for n in _globals_of(methods.values())}
        imports |= {f"from {program.__module__} import {program.__name__}"}
        handed = ["prior", "decoder", "likelihood", "encoder", "posterior", *(f"{k}={v!r}" for k, v in own.items())]
        return _script(headings, imports, [*lines, f"program = {program.__name__}({', '.join(handed)})"])
    imports |= {"from torch import nn"}
    body = ["def __init__(self) -> None:\n" + textwrap.indent("\n".join(lines), "    "), *methods.values()]
    return "\n".join(
        [
            *(f"# {line}" for line in headings),
            "from __future__ import annotations",
            "",
            *_sorted_imports(imports),
            "",
            "",
            "class Program(nn.Module):",
            "\n\n".join(textwrap.indent(part.rstrip(), "    ") for part in body),
            "",
            "",
            "program = Program()",
        ]
    )


def _of_a_likelihood(spec: Spec, event_shape: Shape, headings: tuple[str, ...]) -> str:
    """A program without latents, which makes its likelihood itself."""
    made: list[str] = []
    imports, classes = set(), []
    for kind, block in (("likelihoods", spec.model.likelihood), ("programs", spec.model.program)):
        cls, options = registry.get(kind, block.name), registry.validate(kind, block.name, block.options)
        imports.add(f"from {cls.__module__} import {cls.__name__}")
        classes.append(cls.__name__)
        made.append("".join(f", {k}={v!r}" for k, v in options.items()))
    likelihood = f"partial({classes[0]}{made[0]})" if made[0] else classes[0]
    imports |= {"from functools import partial"} if made[0] else set()
    return _script(headings, imports, [f"program = {classes[1]}({event_shape!r}, {likelihood}{made[1]})"])


def _script(headings: tuple[str, ...], imports: set[str], lines: list[str]) -> str:
    above = [*(f"# {line}" for line in headings), "from __future__ import annotations", ""]
    return "\n".join([*above, *_sorted_imports(imports), "", *lines])


def _is_own_method(name: str, value: Any) -> bool:
    return inspect.isfunction(value) and not name.startswith("__")


def _globals_of(sources: Any) -> set[str]:
    """The names that functions read and neither define nor find among the builtins."""
    found: set[str] = set()
    for source in sources:
        tree = ast.parse(source)
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        bound = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        bound |= {a.arg for a in ast.walk(tree) if isinstance(a, ast.arg)}
        found |= {n for n in names - bound if not hasattr(builtins, n)}
    return found


def _import_line(name: str, cls: type) -> str:
    """The statement that gives ``name`` the meaning it has in the module of a class."""
    value = vars(sys.modules[cls.__module__])[name]
    if inspect.ismodule(value):
        return f"import {value.__name__}" + (f" as {name}" if name != value.__name__ else "")
    return f"from {value.__module__} import {value.__name__}" + (f" as {name}" if name != value.__name__ else "")


def _sorted_imports(lines: set[str]) -> list[str]:
    """Other packages before ours, modules before names, names of one module together."""
    plain = sorted(line for line in lines if line.startswith("import "))
    names: dict[str, list[str]] = {}
    for line in sorted(lines - set(plain)):
        module, _, name = line.removeprefix("from ").partition(" import ")
        names.setdefault(module, []).append(name)
    froms = [f"from {module} import {', '.join(sorted(found))}" for module, found in sorted(names.items())]
    others = [line for line in froms if not line.startswith("from pyro_vae")]
    return [*plain, *others, "", *(line for line in froms if line not in others)]
