"""``pyro-vae list``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pyro_vae.cli.options import Json

DECLARED = ("models", "guides")
KINDS = {
    "models": "what --model takes: p(z) p(x | z), with what a step costs",
    "guides": "what --guide takes: q(z | x)",
    "priors": "p(z)",
    "likelihoods": "p(x | z), and the data that they take",
    "posteriors": "families of q(z | x)",
    "encoders": "networks from x to features",
    "decoders": "networks from z to features",
    "objectives": "what is minimised",
    "programs": "pairs of Pyro programs that declarations fill",
    "networks": "encoders and decoders",
    "baselines": "what pyro-vae baseline trains, and the data that it takes",
    "data": "data sets by name",
}


def list_(
    kind: Annotated[
        str | None, typer.Argument(metavar="KIND", help=f"One of {', '.join(KINDS)}.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Print what can be named in a declaration or on the command line, with formulas and options."""
    import json as json_

    from pyro_vae.errors import UserError, nearest
    from pyro_vae.tables import markdown

    if kind is None:
        print(
            json_.dumps({"kinds": list(KINDS)}) if json else "\n".join(f"{k:<12} {text}" for k, text in KINDS.items())
        )
        return
    if kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}: {nearest(kind, KINDS)}")
    entries = _entries(kind)
    if json:
        print(json_.dumps({"kind": kind, "entries": entries}, indent=2))
    elif not entries:
        print(f"There are no {kind} yet.")
    else:
        columns = [c for c in entries[0] if any(e[c] for e in entries)]
        print(markdown(columns, [[_cell(c, e[c]) for c in columns] for e in entries]))


def _entries(kind: str) -> list[dict[str, Any]]:
    """One dict per name, all with the same keys."""
    if kind in DECLARED:
        from pyro_vae.declared import find, heading, names

        entries = [{"name": n, "formula": heading(find(kind, n))} for n in names(kind)]  # type: ignore[arg-type]
        return entries if kind == "guides" else _with_costs(entries)
    if kind == "data":
        from pyro_vae.data.names import DATA_SETS

        return [{"name": name, "description": text} for name, text in DATA_SETS.items()]
    if kind == "networks":
        return [{"name": e.pop("name"), "kind": k[:-1], **e} for k in ("encoders", "decoders") for e in _entries(k)]
    from pyro_vae import registry

    return [_block(kind, name, registry.get(kind, name)) for name in registry.names(kind)]


def _with_costs(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The likelihood, the network, the parameters and the cost of a step beside each model, on 28 x 28 images."""
    from pyro_vae.cli.costs import table

    costs = table()
    columns = [key for key in next(iter(costs.values())) if key != "flops"]
    return [
        {"name": e["name"], **{c: costs.get(e["name"], {}).get(c) for c in columns}, "formula": e["formula"]}
        for e in entries
    ]


def _block(kind: str, name: str, cls: Any) -> dict[str, Any]:
    """A registered class: what it says of itself, and its options."""
    from pyro_vae import registry

    entry: dict[str, Any] = {"name": name}
    if kind in ("encoders", "decoders", "programs"):
        entry["description"] = _first_line(cls)
    else:
        entry["formula"] = cls.formula
    if kind in ("likelihoods", "baselines"):
        entry["data"] = cls.data
    if kind in ("priors", "posteriors"):
        entry["support"] = _support_text(cls.support)
    if kind == "posteriors":
        entry["scoring"] = cls.scoring
    entry["options"] = {
        key: {"type": _type_text(f.annotation, f.metadata), "default": None if f.is_required() else f.default}
        for key, f in registry.schema(kind, name).model_fields.items()
    }
    return entry


def _first_line(cls: Any) -> str:
    import inspect

    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _support_text(support: Any) -> str:
    """``real vector`` for IndependentConstraint(Real(), 1), and so on.

    >>> from torch.distributions import constraints
    >>> _support_text(constraints.real_vector), _support_text(constraints.unit_interval)
    ('real vector', 'unit interval')
    """
    from torch.distributions import constraints

    for name in ("real_vector", "real", "positive", "unit_interval", "simplex", "boolean", "one_hot"):
        if repr(getattr(constraints, name)) == repr(support):
            return name.replace("_", " ")
    if type(support).__name__ in ("IndependentConstraint", "_IndependentConstraint", "independent"):
        return _support_text(support.base_constraint) + " vector"
    return repr(support).lower()


def _type_text(annotation: Any, metadata: Any = ()) -> str:
    """A type as words: ``integer >= 1``, ``"shared" or "per-pixel"``.

    >>> from typing import Annotated, Literal
    >>> from pydantic import Field
    >>> _type_text(Annotated[float, Field(gt=0)] | Literal["shared", "per-pixel"])
    'number > 0, "shared" or "per-pixel"'
    """
    import types
    from collections.abc import Sequence
    from typing import Literal, Union, get_args, get_origin

    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(arguments[0], arguments[1:])
    if origin is dict:
        text = "table"
    elif origin is Literal:
        text = _either([f'"{a}"' if isinstance(a, str) else str(a) for a in arguments])
    elif origin in (Union, types.UnionType):
        # words already joined by "or" are taken apart, so that the whole reads as one list
        text = _either([w for a in arguments for w in _type_text(a).replace(" or ", ", ").split(", ")])
    elif origin in (list, tuple, Sequence):
        text = f"list of {_type_text(arguments[0])}".replace("integer", "integers").replace("number", "numbers")
    else:
        plain = {int: "integer", float: "number", str: "string", bool: "true or false", type(None): "none"}
        text = plain.get(annotation, getattr(annotation, "__name__", str(annotation)))
    return text + _bounds(metadata)


def _bounds(metadata: Any) -> str:
    """`` >= 1`` and the like, from what pydantic keeps of a Field."""
    found = []
    for item in metadata:
        for part in [*getattr(item, "metadata", ()), item]:
            for key, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
                if getattr(part, key, None) is not None:
                    found.append(f" {sign} {getattr(part, key):,}")
    return " and".join(found)


def _either(words: list[str]) -> str:
    return ", ".join(words[:-1]) + f" or {words[-1]}" if len(words) > 1 else words[0]


def _cell(column: str, value: Any) -> str:
    if column != "options":
        return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)
    return "; ".join(f"{key} = {_default_text(o['default'])} ({o['type']})" for key, o in value.items())


def _default_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_default_text, value)) + "]"
    return "none" if value is None else f'"{value}"' if isinstance(value, str) else str(value)
