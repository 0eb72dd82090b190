"""The missing entries of a record, by the posterior of what is present.

    p(x_miss | x_obs) = E[p(x_miss | z) | x_obs],   by draws z ~ q(z | x_obs) with weights p(x_obs, z) / q(z | x_obs)

What the guide draws itself (a missing label) is weighed with the other latents, discrete columns of few states in every state;
what it does not is drawn from its own distribution. Self-normalised importance sampling, with resampling for draws: Rubin 1987,
https://doi.org/10.1080/01621459.1987.10478461; for VAEs, Mattei & Frellsen 2019, https://arxiv.org/abs/1812.02633.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_vae.errors import UserError, warn
from pyro_vae.evaluation.blind import require_weights
from pyro_vae.evaluation.estimators import estimate, good_khat
from pyro_vae.evaluation.proven import blind_spots
from pyro_vae.evaluation.result import BAD_FRACTION, UnreliableEstimateWarning
from pyro_vae.precision import wide
from pyro_vae.programs.columns import Layout, layout_of
from pyro_vae.programs.door import admitted, door
from pyro_vae.programs.latents import mean_of
from pyro_vae.programs.summing import states_of, summed
from pyro_vae.programs.trace import Program, Traced, innermost, isolated, trace
from pyro_vae.programs.walk import Block, Walk, at_once
from pyro_vae.seeding import derive_seed, seeded


@dataclass(frozen=True, eq=False)
class ImputedColumns:
    """What the posterior says of the missing entries of each column that has some; tensors are on the CPU.

    Attributes:
        mean: by column, E[x | x_obs] with x itself where it is present, ``(N, *column)``; not of class numbers.
        mc_se: its Monte Carlo standard error, 0 where it is present.
        probability: by column of class numbers, that of each class ``(N, *column, classes)``; 1 for the one that is present.
        draws: complete columns, of which what is missing is drawn from the posterior, ``(num_draws, N, *column)``; jointly.
        ess: effective number of the draws of a row ``(N,)``.
        khat: Pareto k of the weights ``(N,)``.
        num_samples: K, draws that were weighed.
    """

    mean: dict[str, Tensor]
    mc_se: dict[str, Tensor]
    probability: dict[str, Tensor]
    draws: dict[str, Tensor]
    ess: Tensor
    khat: Tensor
    num_samples: int

    def interval(self, name: str, level: float = 0.9) -> Tensor:
        """Where an entry of a column lies with a probability, as far as the draws tell, ``(N, *column, 2)``."""
        tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        return torch.quantile(self.draws[name].double(), tails, 0).movedim(0, -1)

    @property
    def warnings(self) -> list[str]:
        """Whether the weights can be relied on."""
        bad = float((~(self.khat <= good_khat(self.num_samples))).double().mean())
        if bad <= BAD_FRACTION:
            return []
        return [
            f"Pareto k is bad for {bad:.1%} of {len(self.khat)} rows: what is imputed lies between the guide and the posterior; "
            "use a more expressive guide, or more draws (num_samples)"
        ]


@door(records=True)
def impute_columns(
    program: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_samples: int = 1000,
    num_draws: int = 100,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> ImputedColumns:
    """Fill the missing entries of a record by the posterior of those that are present.

    Args:
        program: any Program with columns.
        x: a :class:`pyro_vae.Record`.
        y: what a conditional program is conditioned on, ``(N, ...)``.
        num_samples: K, draws of the guide that are weighed; of each state, where discrete columns are summed over.
        num_draws: complete records that are drawn.
        seed: of everything drawn; torch's generators are put back.
        progress: called with rows' worth of work done.

    Raises:
        UserError: a tensor, whose missing elements are named by ``seen`` (:func:`pyro_vae.analysis.imputation.impute`); nothing
            missing.

    Warns:
        UnreliableEstimateWarning: weights that are not to be trusted, latents that the guide never proposes.
    """
    traces, layout = admitted(), layout_of(program, x)
    if layout is None or num_samples < 2 or num_draws < 1:
        raise UserError("expected a record, num_samples of at least 2, and num_draws of at least 1")
    names = [c.name for c in layout.columns if c.name in layout.sites and c.missing != "no"]
    if not names:
        raise UserError(
            "nothing is missing in the columns that are sites of the model: say what is present, pv.Record(...)"
        )
    require_weights(traces)
    states = states_of(program, x)
    size = num_samples * (1 if states is None else len(next(iter(states.values()))))
    walk = Walk(program, x, y, rows=at_once("posterior draws", size * x[0].numel()), progress=progress)
    for block in walk:
        with block, isolated(), seeded(derive_seed("imputed columns", seed, block.first), block.x.device):
            walk.keep(_imputed(program, block, layout, names, states, num_samples, num_draws))
    parts = walk.gathered()

    def joined(kind: str, axis: int = 0) -> dict[str, Tensor]:
        return {n: torch.cat([part[kind][n] for part in parts], axis) for n in parts[0][kind]}

    ess, khat = (torch.cat([part[kind] for part in parts]) for kind in ("ess", "khat"))
    found = ImputedColumns(
        joined("mean"), joined("mc_se"), joined("probability"), joined("draws", 1), ess, khat, num_samples
    )
    for message in [*blind_spots(program, x, y, traces), *found.warnings]:
        warn(message, UnreliableEstimateWarning)
    return found


def _imputed(
    program: Program,
    block: Block,
    layout: Layout,
    names: list[str],
    states: dict[str, Tensor] | None,
    num_samples: int,
    num_draws: int,
) -> dict[str, Any]:
    x, y, rows = block.x, block.y, len(block.x)
    if states is None:
        traces = trace(program, x, y, num_samples=num_samples)
        log_weight = each = traces.terms(num_samples, rows).log_weight
        model = traces.model
    else:
        runs = summed(program, x, y, states, num_samples)
        terms, model = runs.terms(), runs.model
        each, log_weight = runs.log_weights(terms).flatten(0, 1), runs.log_weight(terms)
    weight = wide(each).softmax(0)
    found: dict[str, Any] = {kind: {} for kind in ("mean", "mc_se", "probability", "draws")}
    reliable = estimate(log_weight)
    found["ess"], found["khat"] = 1 / weight.square().sum(0).cpu(), reliable.khat
    chosen = torch.multinomial(weight.T, num_draws, replacement=True).T  # (num_draws, rows)
    record = layout.unpacked(x)
    for name in names:
        draws, mean = _values(layout, model, name, len(each), rows)
        column, known = record[name], record.present[name]
        shape = column.shape[1:]
        known = known.reshape(known.shape + (1,) * (column.dim() - known.dim()))
        draws = draws.reshape(len(each), rows, *shape)
        picked = draws.gather(0, chosen.reshape(num_draws, rows, *[1] * len(shape)).expand(num_draws, rows, *shape))
        filled = torch.where(known, column.to(picked.dtype), picked)
        whole = column.is_floating_point() or model.nodes[name]["fn"].support.is_discrete  # else draws lie between
        found["draws"][name] = (filled.to(column.dtype) if whole else filled).cpu()
        by_class = _classes(model, name)
        if by_class is not None:
            hits = one_hot(draws.long(), by_class).to(weight)  # (K, rows, *column, classes)
            found["probability"][name] = (weight.reshape(*weight.shape, *[1] * (hits.dim() - 2)) * hits).sum(0).cpu()
            continue
        mean = wide(mean.reshape(len(each), rows, *shape))
        w = weight.reshape(*weight.shape, *[1] * len(shape))
        centre = (w * mean).sum(0)
        error = (w.square() * (mean - centre).square()).sum(0).sqrt()
        found["mean"][name] = torch.where(known, column.to(centre.dtype), centre).cpu()
        found["mc_se"][name] = torch.where(known, torch.zeros_like(error), error).cpu()
    return found


def _values(layout: Layout, model: Traced, name: str, size: int, rows: int) -> tuple[Tensor, Tensor]:
    """Draws of a column ``(size, rows, *event)``, and what to average for its mean."""
    site = model.nodes[name]
    fn, shape = site.get("whole", site["fn"]), (size, rows, *site["fn"].event_shape)
    if name in layout.guided or layout.read:
        value = site["value"].expand(shape)
        return value, value
    return fn.sample().expand(shape), mean_of(fn).expand(shape)


def _classes(model: Traced, name: str) -> int | None:
    """How many classes a site of class numbers has; None of any other."""
    base = innermost(model.nodes[name]["fn"])
    return base.probs.shape[-1] if isinstance(base, torch.distributions.Categorical) else None
