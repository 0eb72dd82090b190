"""``pyro-vae show``."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def show(
    model: Annotated[
        str, typer.Argument(help="A declared model, or the path of a .toml or .py file.", show_default=False)
    ],
    guide: Annotated[
        str | None, typer.Argument(help="A declared guide, or the path of a .toml file.", show_default=False)
    ] = None,
    shape: Annotated[str, typer.Option(metavar="N,N,...", help="The shape of one datum.")] = "1,28,28",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="dotted.key=value", help="Any key of the two specs.")
    ] = None,
    python: Annotated[bool, typer.Option("--python", help="Print the Python alone, to be piped into a file.")] = False,
) -> None:
    """Print a model and guide: formula, sites, parameters, declaration, and the Python they stand for."""
    from pathlib import Path

    from pyro_vae import registry
    from pyro_vae.declared import find, heading, names
    from pyro_vae.errors import UserError

    event_shape = _shape(shape)
    if model not in names("models") and not Path(model).suffix and model in registry.names("baselines"):
        if guide is not None or python:
            raise UserError(f"{model} is a baseline and no pair of programs: leave {guide or '--python'} out")
        _show_baseline(model, event_shape, set_ or [])
        return
    path = find("models", model)
    if path.suffix == ".py":
        if guide is not None:
            raise UserError(f"{model} is a whole Pyro program with its own guide: leave {guide} out")
        _show_file(path, event_shape, python, set_ or [])
        return
    from pyro_vae.analysis.source import python_source
    from pyro_vae.spec import DEFAULT_GUIDE, construct, declare, parse_assignment

    spec = declare(model, guide).override(dict(parse_assignment(text) for text in set_ or []))
    program = construct(spec, event_shape)
    guide = (guide or DEFAULT_GUIDE) if spec.model.latents else None
    headings = (heading(path), *([heading(find("guides", guide))] if guide else []))
    source = python_source(spec, event_shape, headings)
    if python:
        print(source)
        return
    print(f"# {', '.join(Path(name).stem for name in (model, guide) if name)}\n")
    print(
        "\n".join(
            [*(f"    {line}" for line in program.formulas.values()), "", *(f"{line}  " for line in headings)]
        ).rstrip()
    )
    prior, posterior = getattr(program, "prior", None), getattr(program, "posterior", None)
    own, mixed = getattr(prior, "components", 1), getattr(posterior, "components", 1)
    if prior is not None and prior.scores_guide and mixed > 1:
        print(f"\np(z) has {own:,} x {mixed:,} = {own * mixed:,} components, under all of which each z is scored.")
    _print_contents(program)
    print(f"\n## Declaration\n\n```toml\n{spec.to_toml().strip()}\n```")
    print(f"\n## The Python that it stands for\n\n```python\n{source}\n```")


def _show_baseline(name: str, event_shape: tuple[int, ...], assignments: list[str]) -> None:
    """What it is, how many parameters it has, and its options."""
    import inspect

    from pyro_vae import registry
    from pyro_vae.baselines.training import declare
    from pyro_vae.spec import parse_assignment
    from pyro_vae.tables import markdown

    cls = registry.get("baselines", name)
    chosen = dict(parse_assignment(text) for text in assignments)
    made = declare(name, chosen, event_shape, 0)
    said = (inspect.getdoc(cls) or "").partition("\nArgs:")[0].strip()
    count = sum(p.numel() for p in getattr(made, "program", made).parameters())
    print(f"# {name}\n\n    {made.formula}\n\n{said}\n")
    print(f"It takes {made.data} images. With the options below it has {count:,} parameters at {list(event_shape)}.\n")
    fields = registry.schema("baselines", name).model_fields
    rows = [[key, str(f.default), str(chosen.get(key, f.default))] for key, f in fields.items()]
    print(f"## Options, for --set\n\n{markdown(['option', 'default', 'here'], rows)}")
    print(f"\n## The command that trains it\n\n    pyro-vae baseline {name} DATA --out DIR")


def _show_file(path: Any, event_shape: tuple[int, ...], python: bool, assignments: list[str]) -> None:
    """A whole Pyro program in a file of its own: what it says of itself, what can be set, and what it does."""
    from pyro_vae.declared import heading
    from pyro_vae.programs.file import load_program, options
    from pyro_vae.spec import parse_assignment
    from pyro_vae.tables import markdown
    from pyro_vae.training.run import remember_shape

    source = path.read_text(encoding="utf-8").rstrip()
    if python:
        print(source)
        return
    chosen = dict(parse_assignment(text) for text in assignments)
    program, known = load_program(path, event_shape, settings=chosen), options(path)
    remember_shape(program, event_shape)
    print(f"# {path.stem}\n\n{heading(path)}")
    if known:
        print("\n## Arguments, for --set\n")
        rows = [[name, repr(default), repr(chosen.get(name, default))] for name, default in known.items()]
        print(markdown(["argument", "default", "here"], rows))
    _print_contents(program)
    print(f"\n## The Python that it is\n\n```python\n{source}\n```")


def _print_contents(program: Any) -> None:
    """Sites and parameters as tables."""
    from pyro_vae.analysis import describe
    from pyro_vae.programs.labels import needs_y
    from pyro_vae.tables import markdown

    if needs_y(program):
        print("\nThe program is conditional, model(x, y): its sites depend on what y is.")
    rows = [
        (s.part, s.name, s.distribution, _axes(s.batch_shape), _axes(s.event_shape), s.role)
        for s in ([] if needs_y(program) else describe.sites(program))
    ]
    if rows:
        print("\n## Sites\n")
        print(markdown(("program", "site", "distribution", "batch shape", "event shape", "role"), rows))
    found = describe.parameters(program)
    frozen = sum(p.count for p in found) - describe.total(found)
    print(
        f"\n## Parameters: {describe.total(found):,}"
        + (f" and {frozen:,} that are held fixed" if frozen else "")
        + "\n"
    )
    print(markdown(("parameter", "shape", "count"), [(p.name, _axes(p.shape), f"{p.count:,}") for p in found]))


def _axes(shape: tuple[Any, ...]) -> str:
    return "(" + ", ".join(str(n) for n in shape) + ("," if len(shape) == 1 else "") + ")"


def _shape(text: str) -> tuple[int, ...]:
    """``1,28,28`` as a tuple of positive integers."""
    from pyro_vae.errors import UserError

    parts = text.strip("() ").rstrip(",").split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--shape {text!r}: expected positive integers separated by commas, as in 1,28,28")
    return tuple(int(part) for part in parts)
