"""The sites of a program, held to the contract one by one: where they stand, which are observed, and what shapes they have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_vae.errors import ProgramError
from pyro_vae.programs.columns import TWIN, Layout, layout_of
from pyro_vae.programs.folding import ByRow
from pyro_vae.programs.masks import counted
from pyro_vae.programs.rows import DRAWS, ROWS, AxesError, PlaceError, log_prob_of
from pyro_vae.programs.trace import (
    DATA_PLATE,
    SAMPLE_PLATE,
    Traces,
    is_factor,
    is_random,
    latent_sites,
    observation,
    site_log_prob,
)

OBSERVED_SLACK = (
    0.01  # of the largest number, by which a program may move what it observes (off an edge, within a level)
)


def check_sites(program: Any, traces: Traces, batch: int, x: Tensor | None = None) -> None:
    """Where the sites stand, and which are observed."""
    own = {id(p) for p in program.parameters()}
    for part, traced in (("model", traces.model), ("guide", traces.guide)):
        for name, site in traced.nodes.items():
            if (
                site["type"] == "param"
                and id(getattr(site["value"], "unconstrained", lambda v=site["value"]: v)()) not in own
            ):
                raise ProgramError(
                    f"{part}: pyro.param({name!r}) belongs to no module; write program = pv.adopt(program), which owns it, or "
                    f"make it an nn.Parameter of {type(program).__name__}"
                )
            if site["type"] == "sample" and type(site["fn"]).__name__ == "_Subsample" and name != SAMPLE_PLATE:
                _check_plate(part, name, site, batch)
            if is_random(site):
                _check_place(part, name, site, batch)
    seen, layout = observation(traces.model), layout_of(program, x)
    for part, traced in (("model", traces.model), ("guide", traces.guide)):
        for name, site in traced.nodes.items():
            if not is_random(site) or not site["is_observed"] or is_factor(site):
                continue
            if part == "guide":
                raise ProgramError(
                    f"guide: the site {name!r} is observed, and q(z | x) has none; leave obs out, or the site"
                )
            if name != seen and layout is None:
                raise ProgramError(
                    f"model: a second observed site {name!r} beside {seen!r}: what would be reported is the density of both; "
                    "make them one site that observes all of x, or columns of a record (pv.Record); or, for log p of "
                    f"{seen!r} given the other, pv.adopt(program, conditioned=({name!r},))"
                )


def raw_log_prob(site: dict[str, Any]) -> Tensor:
    """The log-density of a site as the program's own batch shape has it."""
    return site_log_prob({**site, "mask": None})


def check_latents(traces: Traces) -> None:
    """The guide's sites are the model's, each of the same event shape."""
    model, guide = latent_sites(traces.model), latent_sites(traces.guide)
    missing = set(model) - set(guide)
    if missing:
        name = sorted(missing)[0]
        marked = ""
        if model[name]["infer"].get("enumerate"):
            marked = " (nothing here sums over a site for its infer={'enumerate': ...})"
        raise ProgramError(f"guide: no site for the model's latent {name!r}; sample it under that name{marked}")
    extra = [n for n, s in guide.items() if n not in model and not s["infer"].get("is_auxiliary")]
    if extra:
        raise ProgramError(f"guide: the site {extra[0]!r} is no latent of the model; rename it or mark it is_auxiliary")
    for name, site in model.items():
        ours, theirs = tuple(guide[name]["fn"].event_shape), tuple(site["fn"].event_shape)
        if ours != theirs:
            raise ProgramError(
                f"guide: the site {name!r} has event shape {ours}, and the model's {theirs}; they would fit by broadcasting "
                "alone: give both one shape, with .expand and .to_event(n)"
            )


def _check_plate(part: str, name: str, site: dict[str, Any], batch: int) -> None:
    size, subsample = site["fn"].size, site["fn"].subsample_size
    if subsample not in (None, size, batch, batch * DRAWS):
        raise ProgramError(
            f"{part}: the plate {name!r} is subsampled ({subsample} of {size}); the library does the minibatching: write "
            f"pyro.plate({DATA_PLATE!r}, x.shape[0], dim=-1)"
        )


def _check_place(part: str, name: str, site: dict[str, Any], batch: int) -> None:
    frames = [f for f in site["cond_indep_stack"] if f.name != SAMPLE_PLATE]
    if not any(f.dim == -1 and f.size == batch for f in frames):
        raise PlaceError(
            f"{part}: the site {name!r} stands outside the data plate, so that all rows share it, and no row has a log p(x) of "
            f"its own; write it inside pyro.plate({DATA_PLATE!r}, x.shape[0], dim=-1), or make it a parameter (pyro.param)"
        )
    if len(frames) > 1:
        extra = next(f for f in frames if not (f.dim == -1 and f.size == batch))
        raise PlaceError(f"{part}: the site {name!r} is in a second plate {extra.name!r}; make that axis an event axis")


def check_shapes(traces: Traces, x: Tensor) -> None:
    """The observation is x, and has the shape of its distribution without broadcasting."""
    if (layout := layout_of(traces.program, x)) is not None:
        check_columns(traces, layout, x)
        return
    seen = observation(traces.model)
    site = traces.model.nodes[seen]
    fn, value = site["fn"], site["value"]
    if isinstance(fn, ByRow) and value.dim() == 2 + len(fn.event_shape):  # x was given once for each sample
        value = site["value"] = value[0]
    expected, got = (len(x), *fn.event_shape), tuple(value.shape)
    if got != expected:
        more = len(got) - len(expected)
        remedy = "give them one shape, with .expand or .reshape"
        if more > 0:
            remedy = f"make the last {'axis an event axis' if more == 1 else 'axes event axes'} of the data with .to_event(n)"
        elif more < 0:
            remedy = "drop the axes that the data lack (.squeeze, or fewer in .to_event)"
        raise AxesError(
            f"model: at the site {seen!r} the observation has shape {got}, and the distribution, with event shape "
            f"{tuple(fn.event_shape)}, takes {expected}: they would fit by broadcasting alone; {remedy}"
        )
    if value.numel() != x.numel():
        raise AxesError(
            f"model: the site {seen!r} observes a tensor of shape {got}, and the data are {tuple(x.shape)}; write obs=x, "
            "and prepare the data before they are handed over"
        )
    given, seen = x.reshape(value.shape), value.to(x.dtype)
    off = (
        (seen - given).abs() > OBSERVED_SLACK * float(x[torch.isfinite(x)].abs().amax()) if x.isfinite().any() else None
    )
    if off is not None and (mask := counted(site)) is not None:
        off = off & (mask[0] if mask.dim() > off.dim() else mask)
    if off is not None and bool(off.any()):
        raise AxesError(
            f"model: the site {seen!r} observes {float(seen[off][0]):.4g} where the data hold {float(given[off][0]):.4g}: "
            "what would be reported is the density of other data; write obs=x, and prepare the data before they are handed over"
        )


def check_columns(traces: Traces, layout: Layout, x: Tensor) -> None:
    """What sites of the model observe are columns; :class:`ProgramError` for anything else."""
    record, names = layout.unpacked(x), {column.name for column in layout.columns}
    for name, site in traces.model.nodes.items():
        twin = name.removesuffix(TWIN) in names
        if not is_random(site) or not site["is_observed"] or is_factor(site) or name in names or twin:
            continue
        raise ProgramError(
            f"model: the site {name!r} is observed, and the record has the columns {', '.join(sorted(names))}: call a column "
            "like the site that it is the observation of"
        )
    for name in layout.sites:
        given = traces.model.nodes[name].get("given")
        if given is None:
            continue
        known, column = record.present[name], record[name]
        if given.shape[:1] != column.shape[:1]:  # once for each sample
            given = given[0]
        if given.numel() != column.numel():
            raise AxesError(
                f"model: the site {name!r} observes a tensor of shape {tuple(given.shape)}, and its column is "
                f"{tuple(column.shape)}; write obs=x[{name!r}], or leave obs out"
            )
        off = (given.reshape(column.shape).to(record.dtype) - column.to(record.dtype)).abs()
        wide = known.reshape(known.shape + (1,) * (column.dim() - known.dim()))
        if bool(
            (off.where(wide, torch.zeros_like(off)) > OBSERVED_SLACK * float(column.to(record.dtype).abs().max())).any()
        ):
            raise AxesError(
                f"model: the site {name!r} observes other numbers than its column holds: write obs=x[{name!r}], or leave obs out"
            )


def check_log_probs(traces: Traces) -> None:
    """Every random site has one log-density for each draw and row."""
    for part, traced in (("model", traces.model), ("guide", traces.guide)):
        for name, site in traced.nodes.items():
            shape = tuple(log_prob_of(part, name, site).shape) if is_random(site) else ()
            if len(shape) > 2 or any(
                have not in (1, want) for have, want in zip(shape[::-1], (ROWS, DRAWS), strict=False)
            ):
                raise AxesError(
                    f"{part}: log_prob of the site {name!r} has shape {shape} where (num_samples, batch) = ({DRAWS}, {ROWS}) was "
                    "expected; make the other axes event axes with .to_event(n)"
                )
