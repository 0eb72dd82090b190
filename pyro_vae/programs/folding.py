"""Samples folded into rows: what a program does with N rows it does with S x N.

A program that does not take an axis of samples left of its rows (it concatenates, or has a BatchNorm, a GRU or a ``view`` of its
own) is given x, and what goes with it, S times over, as S x N rows in its own plate; its sites are read as ``(S, N)`` again.
That is exact because rows stand for themselves. So are read, too, sites with further plates inside the rows' own, whose axes are
summed over, and sites in a plate without a size, or in none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import ExpandedDistribution, MaskedDistribution, TorchDistribution
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Independent, constraints, kl_divergence
from torch.distributions.kl import register_kl
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_vae.errors import UserError

FOLDS = "_pyro_vae_folds"  # in the __dict__ of a program that is run so
ONCE = "once"  # with the axes of data among what is kept there: with such data the guide has one site, and is run once


class ByRow(TorchDistribution):
    """A distribution over rows, with samples folded into them or not, as one of batch shape ``(samples, rows)`` or ``(rows,)``.

    Args:
        base_dist: of the program's own batch shape.
        samples: S, where S x N rows are S samples of N; None where they are not folded.
        rows: N.
        dim: the axis of rows in the batch shape of ``base_dist``, negative; all others become axes of the event.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  # as torch has it

    def __init__(self, base_dist: Any, samples: int | None, rows: int, dim: int) -> None:
        batch = list(base_dist.batch_shape)
        batch = [1] * (-dim - len(batch)) + batch
        batch[dim] = rows * (samples or 1)
        self.base_dist = base_dist if list(base_dist.batch_shape) == batch else base_dist.expand(torch.Size(batch))
        self.dim, self._lead = dim, torch.Size((rows,) if samples is None else (samples, rows))
        self._total, self.others = batch[dim], torch.Size(batch[: len(batch) + dim] + batch[len(batch) + dim :][1:])
        super().__init__(self._lead, self.others + base_dist.event_shape, validate_args=False)

    def of(self, base_dist: Any) -> ByRow:
        """The same of another distribution of the program's own batch shape."""
        samples = self._lead[0] if len(self._lead) == 2 else None
        return ByRow(base_dist, samples, self._lead[-1], self.dim)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether the program's distribution is reparameterized."""
        return bool(self.base_dist.has_rsample)

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether the program's distribution lists its values."""
        return bool(self.base_dist.has_enumerate_support)

    @property
    def support(self) -> Any:
        """The support, with bounds by row where they are so."""
        support = self.base_dist.support
        event = len(self.base_dist.event_shape)
        if any(bound.dim() > event for _, _, bound in bounds(support)):
            support = copy.deepcopy(support)
            for owner, name, bound in bounds(support):
                if bound.dim() > event:
                    setattr(owner, name, self.outer(bound, bound.dim() - len(self.base_dist.batch_shape)))
        more = len(self.others)
        return constraints.independent(support, more) if more else support

    @property
    def mean(self) -> Tensor:
        """Of the program's distribution, ``(*leading, *event)``."""
        return self.outer(self.base_dist.mean)

    @property
    def variance(self) -> Tensor:
        """Of the program's distribution, ``(*leading, *event)``."""
        return self.outer(self.base_dist.variance)

    def outer(self, value: Tensor, event: int | None = None) -> Tensor:
        """A value of the program's own axes with those of samples and rows first."""
        event = len(self.base_dist.event_shape) if event is None else event
        batch = self.base_dist.batch_shape
        more = value.dim() - event - len(batch)  # axes that were asked of ``sample``, or that the value has not
        own = value.shape[value.dim() - event :] if event else torch.Size()
        lead = value.shape[: max(more, 0)]
        value = value.expand(lead + batch + own)
        value = value.movedim(len(lead) + len(batch) + self.dim, len(lead))
        return value.reshape(lead + self._lead + self.others + own)

    def spread(self, value: Tensor) -> bool:
        """Whether a tensor over the program's batch shape has more than one number along axes other than that of rows."""
        shape = [1] * (len(self.base_dist.batch_shape) - value.dim()) + list(value.shape)
        return any(n > 1 for axis, n in enumerate(shape) if axis - len(shape) != self.dim)

    def inner(self, value: Tensor) -> Tensor:
        """A value with the axes of samples and rows first as the program has it."""
        shape = self._lead + self.event_shape
        lead = value.shape[: max(value.dim() - len(shape), 0)]
        own = value.shape[value.dim() - len(self.event_shape) :] if self.event_shape else torch.Size()
        value = value.expand(lead + self._lead + own).reshape((*lead, self._total, *own))
        return value.movedim(len(lead), len(lead) + len(self.base_dist.batch_shape) + self.dim)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """A draw, as the program's distribution makes one."""
        draw = self.base_dist if callable(self.base_dist) else self.base_dist.sample  # one of torch's, not of Pyro's
        return self.outer(draw(*args, **kwargs))

    def through(self, value: Tensor, score: Callable[[Tensor], Tensor], event: int) -> Tensor:
        """What the program's distribution says of a value, with the axes of samples and rows first.

        Of one sample any number of values may be asked, ``(values, rows, *event)``.
        """
        more = (
            self._lead[0] == 1 and len(self._lead) == 2 and value.dim() == 2 + len(self.event_shape) and len(value) > 1
        )
        found = self.outer(score(self.inner(value.unsqueeze(1) if more else value)), event)
        return found.squeeze(1) if more else found

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws ``(*sample_shape, *batch, *event)``."""
        return self.outer(self.base_dist.rsample(torch.Size(sample_shape)))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws without gradients."""
        with torch.no_grad():
            return self.outer(self.base_dist.sample(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """The log-density by sample and row, ``(*batch)``: summed over the axes of other plates."""
        found = self.through(value, lambda inner: self.base_dist.log_prob(inner, *args, **kwargs), 0)
        return found.sum(tuple(range(found.dim() - len(self.others), found.dim()))) if self.others else found

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Every value, as the program's distribution lists them."""
        listed: Tensor = self.base_dist.enumerate_support(expand=False)
        return self.outer(listed.expand((len(listed), *self.base_dist.batch_shape, *self.base_dist.event_shape)))


class Spread(ByRow):
    """A distribution over N rows that was computed once for S samples: batch shape ``(samples, rows)``, alike along the first."""

    def __init__(self, base_dist: Any, samples: int, rows: int, dim: int) -> None:
        super().__init__(base_dist, None, rows, dim)
        self._batch_shape = torch.Size((samples, rows))

    def of(self, base_dist: Any) -> Spread:
        """The same of another distribution of the program's own batch shape."""
        return Spread(base_dist, self._batch_shape[0], self._batch_shape[1], self.dim)

    @property
    def mean(self) -> Tensor:
        """Of the program's distribution, ``(samples, rows, *event)``."""
        return super().mean.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Of the program's distribution, ``(samples, rows, *event)``."""
        return super().variance.expand(self.batch_shape + self.event_shape)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """A draw for each sample."""
        try:
            return self.rsample() if self.has_rsample else self.sample()
        except NotImplementedError:  # a class that is drawn from by calling it alone
            return torch.stack([super(Spread, self).__call__(*args, **kwargs) for _ in range(self._batch_shape[0])])

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws ``(*sample_shape, samples, rows, *event)``."""
        return super().rsample((*sample_shape, self._batch_shape[0]))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws without gradients."""
        return super().sample((*sample_shape, self._batch_shape[0]))


class Folding(Messenger):
    """Let the sites of a program, which runs on S x N rows, be seen from outside as ``(S, N)``; entered innermost.

    Args:
        samples: S; None where the rows are as they are.
        rows: N.
        once: whether the program runs on the N rows alone, for all samples: a guide of one site, which reads no other's draws.
        dims: which axis is that of rows, by the name of the site, where it was found before; what is found is added. (By its size
            alone it cannot be told from another plate's that has as many.)
    """

    def __init__(self, samples: int | None, rows: int, dims: dict[str, int], once: bool = False) -> None:
        super().__init__()
        self.samples, self.rows, self.dims = samples, rows, dims
        self.repeated = 1 if once else samples or 1
        self.total, self.kind = rows * self.repeated, Spread if once else ByRow

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and type(msg["fn"]).__name__ == "_Subsample":
            taken = msg["fn"].subsample_size
            if taken is not None and taken > msg["fn"].size:  # more rows with all samples than the plate says there are
                msg["value"], msg["done"] = torch.arange(taken), True
            return
        if msg["type"] != "sample" or msg["infer"].get("_deterministic"):
            return
        frames = [f for f in msg["cond_indep_stack"] if f.vectorized]
        known = self.dims.get(msg["name"])
        own = next((f for f in frames if f.size in (self.total, -1) and known in (None, f.dim)), None)
        batch = tuple(msg["fn"].batch_shape)
        if own is None and (frames or not batch or batch[-1] != self.total):
            return  # a site without an axis of rows: it is seen as it is, and refused
        fn, mask = msg["fn"], msg["mask"]
        if isinstance(mask, Tensor):
            fn = fn.expand(torch.broadcast_shapes(fn.batch_shape, mask.shape)).mask(mask)
        dim = self.dims.setdefault(msg["name"], -1 if own is None else own.dim)
        by_row: ByRow = self.kind(fn, self.samples, self.rows, dim)  # type: ignore[arg-type]
        if own is not None and own.full_size not in (
            None,
            own.size,
        ):  # the plate takes each row for as many as there are samples
            msg["scale"] = msg["scale"] * self.repeated
        msg["folded"] = by_row, {name: msg[name] for name in ("fn", "mask", "cond_indep_stack")}
        axes = (
            [("num_samples", self.samples), ("data", self.rows)] if self.samples is not None else [("data", self.rows)]
        )
        msg["cond_indep_stack"] = tuple(
            CondIndepStackFrame(name, place - len(axes), size, 0) for place, (name, size) in enumerate(axes)
        )
        msg["fn"], msg["mask"] = by_row, None if isinstance(mask, Tensor) else mask
        if isinstance(msg["scale"], Tensor) and msg["scale"].dim():
            scale = msg["scale"].expand(by_row.base_dist.batch_shape)
            scale = by_row.outer(scale, 0).flatten(len(by_row.batch_shape)) if by_row.others else by_row.outer(scale, 0)
            if by_row.others:
                if scale.shape[-1] > 1 and by_row.spread(msg["scale"]):
                    raise UserError(
                        f"the site {msg['name']!r} has a scale of its own for each place of a plate inside the rows' own: "
                        "scale rows, or make that axis an event axis"
                    )
                scale = scale[..., 0]
            msg["scale"] = scale
        if msg["value"] is not None:
            msg["value"] = by_row.outer(msg["value"])

    def _postprocess_message(self, msg: Any) -> None:
        if "folded" in msg:
            by_row, own = msg.pop("folded")
            value = msg["value"] if self.kind is ByRow else msg["value"][0]  # no other site is to read it
            msg["value"] = by_row.inner(value)
            msg.update(own)


def folded(part: Callable[..., Any], *how: Any) -> Callable[..., Any]:
    """A model or guide whose sites are seen by sample and row, as :class:`Folding` has it."""

    def run(*args: Any) -> Any:
        with Folding(*how):
            return part(*args)

    return run


def without_plates(traced: Any) -> Any:
    """A trace to replay where the plates may be of other numbers of samples than they were."""
    traced = traced.copy()
    for name in [n for n, site in traced.nodes.items() if type(site.get("fn")).__name__ == "_Subsample"]:
        del traced.nodes[name]
    return traced


def require_no_statistics(program: Any, samples: int) -> None:
    """:class:`UserError` where rows of several samples would be normalised by statistics of all of them."""
    if samples == 1 or not getattr(program, "training", False):
        return
    name = next((n for n, m in program.named_modules() if isinstance(m, _BatchNorm) and m.training), None)
    if name is not None:
        raise UserError(
            f"the BatchNorm {name!r} takes its statistics from all rows in training, and samples are folded into them, so "
            "that those of one sample would move with the others: train with one sample (elbo with num_particles=1), or put it "
            f"into evaluation mode, program.{name}.eval()"
        )


@register_kl(ByRow, ByRow)
def _kl(p: ByRow, q: ByRow) -> Tensor:
    if (p.dim, p.others, p.batch_shape) != (q.dim, q.others, q.batch_shape):
        raise NotImplementedError
    by_place = kl_divergence(p.base_dist, q.base_dist).expand(p.base_dist.batch_shape)
    found = p.outer(by_place, 0)
    return found.sum(tuple(range(found.dim() - len(p.others), found.dim()))) if p.others else found


def bounds(constraint: Any) -> list[tuple[Any, str, Tensor]]:
    """The tensors of a constraint and of those that it is made of, as (owner, attribute, tensor)."""
    found = []
    for name, value in vars(constraint).items():
        if isinstance(value, Tensor):
            found.append((constraint, name, value))
        parts = value if isinstance(value, (list, tuple)) else [value]
        found += [bound for part in parts if isinstance(part, constraints.Constraint) for bound in bounds(part)]
    return found


def innermost(fn: Any) -> Any:
    """The distribution inside of ``Independent``, masks and expansions."""
    while isinstance(fn, (Independent, MaskedDistribution, ExpandedDistribution, ByRow)):
        fn = fn.base_dist
    return fn
