"""Records through a program: a column is observed where it is present, and what the guide draws where it is missing.

A record is packed into one tensor, NaN where an entry is missing, whose number of axes says which layout of the program it has:
so whatever cuts, moves, repeats or compiles x does so with a record. :func:`pyro_vae.programs.trace.run` unpacks it. Of a column
that is a site of the model,

* present entries are observed: in the guide, which draws them nowhere, and in the model;
* missing entries that the guide has a site for are its draws: a latent, whose densities count there alone. The site then stands
  twice in the model's trace: as a latent, and as ``NAME_observed`` (as Pyro's own ``obs_mask`` has it);
* missing entries that it has none for are left out of the site's log-density. In their place stands a draw of the site's own
  distribution, so that sites that read them (a model of what is missing) have the right law: the ratio of its densities is 1.

What of a column's elements is missing in some rows needs a distribution whose elements are independent; whole rows need none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.data.record import Column, Record, flattened, record_of, unflattened
from pyro_vae.errors import UserError
from pyro_vae.programs.folding import ByRow, innermost
from pyro_vae.seeding import ONE_THREAD

LAYOUTS = "_pyro_vae_layouts"  # in the __dict__ of a program
AXES = 8  # of a packed record, one more for each further layout: (N, 1, ..., numbers)
MOST = 40  # layouts of one program: torch has 64 axes
TWIN = "_observed"
ROOM = (constraints.real, constraints.boolean, constraints.nonnegative_integer)  # supports that hold 0


@dataclass(eq=False)
class Layout:
    """How a record lies in a tensor, and what the program was found to do with its columns.

    Attributes:
        sites: columns that are sites of the model; others are covariates.
        guided: those that the guide draws where they are missing.
        read: whether missing entries without a guide are read by later sites; None as long as nobody knows.
        states: the joint states of the discrete latents, by site, where these are few enough to be summed over.
    """

    columns: tuple[Column, ...]
    sites: set[str] = field(default_factory=set)
    guided: set[str] = field(default_factory=set)
    read: bool | None = None
    states: dict[str, Tensor] | None = None

    def unpacked(self, x: Tensor) -> Record:
        """The record in a tensor ``(N, 1, ..., numbers)``, missing entries 0."""
        return unflattened(self.columns, x)

    def columns_of(self, x: Tensor) -> dict[str, Tensor]:
        """The columns that are sites of the model, as they are packed: ``(N, *column)`` in the dtype of x, NaN where missing."""
        parts = zip(self.columns, x.reshape(len(x), -1).split([c.numel for c in self.columns], 1), strict=True)
        return {c.name: part.reshape(len(x), *c.shape) for c, part in parts if c.name in self.sites}

    def without(self, x: Tensor, names: list[str]) -> Tensor:
        """The packed record with these columns missing in all rows."""
        parts = [torch.full((c.numel,), c.name in names) for c in self.columns]
        return torch.where(torch.cat(parts).to(x.device).reshape(x.shape[1:]), torch.nan, x)

    def forget(self) -> None:
        """Know nothing of what the program does with the columns."""
        self.sites, self.guided, self.read, self.states = set(), set(), None, None

    def covariates(self, x: Tensor) -> Tensor:
        """Which numbers of a row are of no site ``(1, ..., numbers)``."""
        parts = [torch.full((c.numel,), c.name not in self.sites) for c in self.columns]
        return torch.cat(parts).to(x.device).reshape(x.shape[1:])

    def left_out(self) -> list[str]:
        """Sites with missing entries that the guide does not draw."""
        return [c.name for c in self.columns if c.missing != "no" and c.name in self.sites - self.guided]


def packed(program: Any, record: Record, *, whole: bool = False) -> Tensor:
    """The record as a tensor that the program, and what runs it, takes for x.

    Args:
        program: which keeps the layout.
        record: to be packed.
        whole: whether any column may be missing in some row, though it is not here: so that all subsets have one layout.

    Raises:
        DataError: whole numbers that a float does not hold.
    """
    return placed(program, *flattened(record, whole=whole))


def taken(program: Any, x: Any) -> Any:
    """A record, or a dict of tensors, packed; anything else as it is."""
    return packed(program, record_of(x)) if isinstance(x, Mapping | Record) else x


def placed(program: Any, columns: tuple[Column, ...], flat: Tensor) -> Tensor:
    """Rows ``(N, numbers)`` of columns as :func:`packed` makes them."""
    with ONE_THREAD:
        layouts: list[Layout] = vars(program).setdefault(LAYOUTS, [])
        place = next((i for i, one in enumerate(layouts) if one.columns == columns), len(layouts))
        if place == MOST:
            raise UserError(
                f"the program was given records of {MOST} kinds (columns, shapes, dtypes, which may be missing), and has no room "
                "for another: hand over copy.deepcopy(program), or give the columns in one order"
            )
        if place == len(layouts):
            layouts.append(Layout(columns))
    return flat.reshape(len(flat), *[1] * (AXES - 2 + place), -1)


def nothing_present(program: Any, layout: Layout, x: Tensor) -> Tensor:
    """The packed record with all columns missing that are sites; covariates stay."""
    record = layout.unpacked(x)
    found = packed(program, record.only([n for n in record if n not in layout.sites]), whole=True)
    other = layout_of(program, found)
    if other is not None:
        other.sites, other.guided, other.read = set(layout.sites), set(layout.guided), layout.read
    return found


def layout_of(program: Any, x: Any) -> Layout | None:
    """The layout of what :func:`packed` made; None of any other tensor."""
    layouts = None if program is None else vars(program).get(LAYOUTS)
    if not layouts or not isinstance(x, Tensor) or not 0 <= x.dim() - AXES < len(layouts):
        return None
    found: Layout = layouts[x.dim() - AXES]
    return found


def given_columns(program: Any, x: Any) -> set[str]:
    """Columns that are present in some entry of these rows, and so no latents of theirs; none of a bare tensor."""
    layout = layout_of(program, x)
    return set() if layout is None else {n for n, known in layout.unpacked(x).present.items() if bool(known.any())}


def left_out_values(layout: Layout, model: Any, num_samples: int, batch: int) -> dict[str, Tensor]:
    """What stands where nothing is present and no guide draws, of a run of the model, ``(num_samples, batch, *event)``."""
    sites = {n: model.nodes[n] for n in layout.left_out()}
    return {n: s["value"].expand(num_samples, batch, *s["fn"].event_shape) for n, s in sites.items()}


class Columns(Messenger):
    """Let the sites of a run have the values of their columns; afterwards :meth:`mark` says in its trace what counts where.

    Args:
        layout: of the record.
        x: the packed record ``(N, 1, ..., numbers)``, which the sites are held to.
        of_guide: whether it is the guide that runs.
        at: values of missing entries that the guide does not draw, by site; fresh draws where there are none.
        trusting: whether sites have the values that the program itself hands over with ``obs=``, which it may move off an edge;
            and not those of the columns.
    """

    def __init__(self, layout: Layout, x: Tensor, of_guide: bool, at: Any = None, trusting: bool = True) -> None:
        super().__init__()
        self.trusting = trusting
        self.layout, self.of_guide, self.at = (
            layout,
            of_guide,
            at if isinstance(at, dict) else getattr(at, "values", {}),
        )
        self.record = layout.unpacked(x)
        self.missing = {column.name: column.missing for column in layout.columns}
        self.given: dict[str, Tensor] = {}  # what the program itself wrote obs= of
        self.scales: dict[str, Any] = {}  # of sites, as the program itself has them
        self.drawn: dict[str, Any] = {}  # of sites that stand in for themselves, what their infer= was

    def reading(self, part: Callable[..., Any]) -> Callable[..., Any]:
        """The model or guide, called with packed records."""
        return lambda x, *y: part(self.layout.unpacked(x), *y)

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.missing or msg["infer"].get("_deterministic") or _is_plate(msg):
            return
        self.scales[name] = msg["scale"]
        if self.of_guide:
            if msg["is_observed"]:
                return  # which is refused
            self.layout.guided.add(name)
            if self.missing[name] == "no":
                msg["value"], msg["done"] = self._column(msg)[0], True
                msg["infer"] = {**msg["infer"], "_deterministic": True, "_clamped": True}
            return
        self.layout.sites.add(name)
        if msg["is_observed"]:
            self.given[name] = msg["value"]
        if name in self.layout.guided and self.missing[name] != "no":
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
            return
        value, known = self._column(msg)
        if self.missing[name] != "no":
            if name in self.at:
                value = torch.where(known, value, self.at[name])
            elif self.layout.read is False and _holds_zero(msg["fn"]):
                value = torch.where(known, value, 0)
            else:  # drawn of the site itself, when all plates have had their say, and hidden from all other handlers
                self.drawn[name] = msg["infer"]
                msg["is_observed"], msg["value"], msg["done"] = False, None, False
                msg["infer"] = {**msg["infer"], "_deterministic": True}
                return
        msg["value"], msg["is_observed"] = value, True

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.missing or msg["is_observed"] or _is_plate(msg):
            return
        if name in self.drawn:
            msg["infer"], msg["is_observed"] = self.drawn[name], True
        elif msg["infer"].get("_deterministic"):
            return
        value, known = self._column(msg)
        msg["value"] = torch.where(known, value.to(msg["value"].dtype), msg["value"])

    def _column(self, msg: Any) -> tuple[Tensor, Tensor]:
        """A site's column ``(N, *event)`` as its distribution draws it, and which entries are present, which broadcasts."""
        value, event = self.record[msg["name"]], msg["fn"].event_shape
        if value[0].numel() != event.numel():
            raise UserError(
                f"the column {msg['name']!r} has {tuple(value.shape[1:])} numbers in a row, and the site of that name "
                f"{tuple(event)}: give both one size"
            )
        value = value.reshape(len(value), *event)
        known = self.record.present[msg["name"]]
        known = known.reshape(value.shape) if known.dim() > 1 else known.reshape(-1, *[1] * len(event))
        if (given := self.given.get(msg["name"])) is not None:
            own = self.trusting and given.shape[given.dim() - len(event) :] == event
            value = given if own else value.to(given.dtype)
            return value if value.is_floating_point() else value.to(_dtype(msg["fn"], value)), known
        return value.to(_dtype(msg["fn"], value)), known

    def mark(self, traced: Any) -> None:
        """Let every site of the trace count where it is what it is: observed, drawn, or neither."""
        for name, missing in self.missing.items():
            site = traced.nodes.get(name)
            if site is None or site["type"] != "sample" or _is_plate(site):
                continue
            known = self.record.present[name]
            site["given"] = self.given.get(name)
            if missing == "no" or site["infer"].get("_deterministic"):
                continue
            if self.of_guide:
                traced.nodes[name] = _counting(site, ~known, drawn=True)
            elif site["is_observed"]:
                traced.nodes[name] = _counting(site, known)
            elif name + TWIN in traced.nodes:
                raise UserError(
                    f"the site {name + TWIN!r} has the name that what is observed of {name!r} is given: rename it"
                )
            else:
                traced.nodes[name] = _counting(site, ~known)
                # what is observed is no latent, and is not scaled as these are (a KL that warms up)
                own = {"is_observed": True, "name": name + TWIN, "scale": self.scales[name]}
                traced.nodes[name + TWIN] = {**_counting(site, known), **own}


class Clamped(MaskedDistribution):
    """Elements that are drawn, and others that are given: no density of these is asked for, masks or none."""


def _counting(site: dict[str, Any], kept: Tensor, *, drawn: bool = False) -> dict[str, Any]:
    """A site whose rows ``(N,)``, or elements ``(N, *column)``, count where ``kept`` says so."""
    if kept.dim() > 1:
        kind = Clamped if drawn else MaskedDistribution
        fn = site["fn"]
        return {**site, "fn": by_element(fn, kept.reshape(len(kept), *fn.event_shape), kind), "whole": fn}
    mask = kept if site["mask"] is None else kept & site["mask"]
    return {**site, "mask": mask, "whole": site["fn"], **({"drawn": kept} if drawn else {})}


def by_element(fn: Any, mask: Tensor, kind: Any = MaskedDistribution) -> Any:
    """The distribution with a mask ``(N, *event)`` of its elements; :class:`UserError` where these are not independent."""
    if isinstance(fn, ByRow):
        return fn.of(by_element(fn.base_dist, fn.inner(mask), kind))
    inner, axes = elements(fn)
    return kind(inner, mask).to_event(axes)


def elements(fn: Any) -> tuple[Any, int]:
    """The distribution of the elements, and how many axes they have; :class:`UserError` if they are not independent."""
    own = fn.base_dist if isinstance(fn, ByRow) else fn  # whose other axes are plates: independent, too
    inner, axes = own, 0
    while isinstance(inner, torch.distributions.Independent):
        inner, axes = inner.base_dist, axes + inner.reinterpreted_batch_ndims
    if axes != len(own.event_shape):
        raise UserError(
            f"missing elements need a likelihood whose elements are independent given z, and {type(inner).__name__} has joint "
            "axes: say by row what is missing, or write the elements as sites, or columns, of their own"
        )
    return inner, axes


def _is_plate(site: Any) -> bool:
    return type(site["fn"]).__name__ == "_Subsample"


def _dtype(fn: Any, value: Tensor) -> torch.dtype:
    """In which a distribution draws: class numbers are integers, bits are floats."""
    base = innermost(fn)
    try:
        found: torch.dtype = base.enumerate_support(expand=False).dtype
    except (NotImplementedError, AttributeError, ValueError):
        return value.dtype if value.is_floating_point() else torch.get_default_dtype()
    return found


def _holds_zero(fn: Any) -> bool:
    support = innermost(fn).support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return any(support is room for room in ROOM)
