"""What must hold of the weights of any program, asked on data whose truth is known: the model's own.

z*, x* drawn from the model are an exact draw of p(z | x*). From it and K draws of the guide follow

* whether **the weights are weights** (:mod:`pyro_vae.evaluation.places`);
* whether **the guide reaches where the model is**: L = log mean of w_1..w_K and U = log mean of w_0..w_K hold
  E[L] <= log p(x) <= E[U] (Grosse et al. 2016, https://arxiv.org/abs/1606.00275; Brekelmans et al. 2022,
  https://openreview.net/forum?id=T0B9AoM_bFg). A row is *blind* where nothing of its own warns (Pareto k is good) and z* has no
  density under the guide, or more than 0.95 of the weight of all. The share of blind rows estimates how much of the posterior is
  out of reach at this K;
* whether the data's rows are like the model's, to which the proof belongs.

Of every row of data, without a number, is asked: are sites masked alike in guide and model, are draws more than one number, do
supports hold each other, and is the Jacobian of a change of variables what is said (:mod:`pyro_vae.programs.auxiliary`).
Densities of classes written by hand are held to integrate to 1 (:mod:`pyro_vae.evaluation.normalised`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro.distributions import ImproperUniform
from scipy import stats
from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.evaluation import places
from pyro_vae.evaluation.consistency import FAMILY_LEVEL
from pyro_vae.evaluation.every_row import folds, look_at_every_row
from pyro_vae.evaluation.normalised import DRAWS, NO_POWER, by_hand, normalisation
from pyro_vae.evaluation.questions import DATA, DENSITIES, FOLDS, REACH, WEIGHTS, Proof, Question
from pyro_vae.evaluation.simulated import (
    DrawnRows,
    NotSimulated,
    Simulated,
    blind,
    figures_of,
    simulated,
    weighed_again,
)
from pyro_vae.evaluation.weights import weigh
from pyro_vae.programs.columns import layout_of
from pyro_vae.programs.contract import require_latents
from pyro_vae.programs.door import admitted, door
from pyro_vae.programs.masks import counted
from pyro_vae.programs.scoring import scores_any
from pyro_vae.programs.trace import (
    Program,
    Traces,
    device_of,
    evaluating,
    innermost,
    is_factor,
    is_random,
    isolated,
    latent_sites,
    trace,
)
from pyro_vae.programs.walk import Walk, at_once
from pyro_vae.seeding import derive_seed, seeded

ROWS, SAMPLES = 256, 100  # simulated rows at least, and draws of the guide for each
MOST_ROWS, AGAIN = 4096, 4096
SEQUENTIAL = 8  # times fewer rows where the guide scores element by element
ASKED_AGAIN = 0.01  # p below which fresh rows are asked, which alone count
SURE = 9.0  # standard errors
BLIND = 0.005  # share of the posterior out of reach that is a fault
MOST_TILT = 2.0  # nats
MORE_DRAWS = 10  # times as many draws for rows that look blind
ROUNDED = 1e-3  # of figures, by which two ways of adding up may differ
HAND_ELEMENTS = 2**22  # draws of a site that is asked for its integral
MOST_AT_LEAST, HAND_ROWS = 8, 100  # whose densities are asked for their integral


@door(records=True)
def prove(
    program: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_rows: int = ROWS,
    num_samples: int = SAMPLES,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Proof:
    """Whether the importance weights of a program are what they are taken for, asked on data that it draws itself.

    Args:
        program: any Program with latents.
        x: data ``(N, *event)``, or a record: what is missing in them is missing in what is drawn; each row is looked at.
        y: what a conditional program is conditioned on, ``(N, ...)``.
        num_rows: drawn rows; more find smaller faults.
        num_samples: K, draws of the guide for each row; what the guide does not reach is asked at this K.
        seed: of the draws; torch's generators are put back.
        progress: called with rows' worth of work, which add up to about ``num_rows``.

    Returns:
        The questions with their evidence, verdicts and power; ``print`` it for a table.

    Raises:
        UserError: a program without latents, whose density is exact; else as :func:`log_likelihood`.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.build("ppca", "linear", (3,), latent_dim=2)
        >>> pv.prove(vae, torch.zeros(4, 3)).faults
        []
    """
    if num_rows < 1 or num_samples < 2:
        raise UserError(
            f"expected num_rows of at least 1 and num_samples of at least 2, got {num_rows} and {num_samples}"
        )
    traces = admitted()
    require_latents(traces, "a proof of weights")
    asking = Proving(program, x, y, traces, num_samples, seed, progress)
    return asking.of_data(asking.of_model(num_rows), ROWS)


@dataclass
class OwnRows:
    """What was found on rows of the model's own."""

    num_rows: int
    questions: list[Question] = field(default_factory=list)
    looseness: float = math.nan
    figures: Tensor | None = None


class Proving:
    """The questions, asked one after the other."""

    def __init__(
        self, program: Program, x: Tensor, y: Tensor | None, traces: Traces, num_samples: int, seed: int,
        progress: Callable[[float], None] | None = None,
    ) -> None:  # fmt: skip
        self.program, self.x, self.y, self.traces = program, x, y, traces
        self.num_samples, self.seed, self.progress = num_samples, seed, progress
        self.asked: list[Question] = []

    def of_model(self, num_rows: int) -> OwnRows:
        """Ask of rows that the model draws."""
        rows = num_rows if scores_any(self.program) else max(1, num_rows // SEQUENTIAL)
        own = OwnRows(rows)
        try:
            if weighing := self._not_weighed():
                raise NotSimulated(weighing)
            kept = self._weights(rows)
            own.looseness, own.figures = kept.looseness, kept.figures
        except NotSimulated as error:
            own.num_rows = 0
            for name in (WEIGHTS, REACH):
                self._ask(Question(name, str(error), "not proved"))
        own.questions, self.asked = self.asked, []
        return own

    def of_data(self, own: OwnRows, num_rows: int) -> Proof:
        """Ask of the rows at hand, and put all together; of ``num_rows`` of them whether they are like the model's."""
        self._every_row()
        self._densities()
        self._folds()
        self.asked += own.questions
        if own.figures is not None and num_rows > 0:
            self._like(own.figures, num_rows)
        return Proof(self._holm(), own.num_rows, self.num_samples, own.looseness, self.seed)

    def _not_weighed(self) -> str:
        """Why there are no exact draws of the posterior; empty where there are."""
        if layout_of(self.program, self.x) is not None:
            return "no rows of records are simulated"
        model = self.traces.model.nodes.values()
        if any(is_random(s) and is_factor(s) for s in model):
            return "a pyro.factor weighs the model's draws"
        if any(isinstance(innermost(s["fn"]), ImproperUniform) for s in model if is_random(s)):
            return "a prior is improper, and cannot be drawn from"
        return ""

    def _ask(self, question: Question, p_value: float | None = None, fault: str = "") -> None:
        """File a question; one with a p-value is a fault where Holm's rule over all of them says so."""
        self.asked.append(replace(question, p_value=p_value, fault=question.fault or fault))

    def _holm(self) -> tuple[Question, ...]:
        """The questions, those whose p-value is too small being faults, and others without the words of one."""
        tested = sorted((q.p_value, place) for place, q in enumerate(self.asked) if q.p_value is not None)
        guilty = set()
        for rank, (p_value, place) in enumerate(tested):
            if p_value > FAMILY_LEVEL / (len(tested) - rank):
                break
            guilty.add(place)
        told = [replace(q, verdict="fault") if place in guilty else q for place, q in enumerate(self.asked)]
        return tuple(q if q.verdict == "fault" else replace(q, fault="") for q in told)

    def _every_row(self) -> None:
        found = look_at_every_row(self.program, self.x, self.y, self.seed)
        names = {
            "masks are the same": found.masks,
            "supports hold the model's": found.supports,
            "draws are no points": found.points,
        }
        for name, lines in names.items():
            evidence = f"all {len(self.x):,} rows"
            self._ask(Question(name, evidence, "fault" if lines else "holds", fault=lines[0] if lines else ""))

    def _densities(self) -> None:
        """Hold what was written by hand to its integral, at the rows at hand."""
        named = {n: s["fn"].event_shape.numel() for part in (self.traces.guide, self.traces.model) for n, s in part.nodes.items()
                 if is_random(s) and not is_factor(s) and by_hand(s["fn"]) is not None}  # fmt: skip
        if not named:
            return
        most = max(MOST_AT_LEAST, min(HAND_ROWS, HAND_ELEMENTS // (DRAWS * max(named.values()))))
        few = spread(len(self.x), min(len(self.x), most))
        for block in Walk(self.program, self.x[few], self.y_of(few), rows=len(few)):
            with block, isolated(), seeded(derive_seed("proof: densities", self.seed), device_of(self.program)):
                traces = trace(self.program, block.x, block.y, num_samples=1)
                for part, traced in (("guide", traces.guide), ("model", traces.model)):
                    for name, site in traced.nodes.items():
                        if name in named and is_random(site) and by_hand(site["fn"]) is not None:
                            self._density(part, name, site, few)

    def _folds(self) -> None:
        """Whether changes of variables are one to one: they take no draw twice."""
        if not set(latent_sites(self.traces.guide)) - set(latent_sites(self.traces.model)):
            return
        few, found = spread(len(self.x), min(len(self.x), HAND_ROWS)), None
        for block in Walk(self.program, self.x[few], self.y_of(few), rows=at_once("calibration", 64**2)):
            with block, isolated(), seeded(derive_seed("proof: folds", self.seed), device_of(self.program)):
                found = folds(self.program, block.x, block.y)
            break
        if found is None:
            self._ask(Question(FOLDS, "no change of variables of at most 10 elements", "not proved"))
            return
        mean, error = found
        z = (mean - 1) / max(error, 1e-3) if mean > 1.05 else 0.0
        self._ask(
            Question(FOLDS, f"E_q[g / q] = {mean:.2f} +- {error:.2g}", "holds", "two to one is 2 or more"),
            float(stats.norm.sf(z)) if z > 0 else 1.0,
            f"the guide makes a latent of an auxiliary site by a map that takes several points to one (E_q[g / q] = {mean:.2f} "
            "of a density g, at most 1 where it is one to one): log q(z) is too low, and log p(x) too high, by the logarithm of "
            "how many; add them up in log_density, or use a map that is one to one",
        )

    def _density(self, part: str, name: str, site: Any, few: Tensor) -> None:
        mask = counted(site)
        found = normalisation(site["fn"], len(few), mask)
        title = f"{DENSITIES}: {part}'s {name!r}"
        kind = by_hand(site["fn"])
        if found.unasked:
            self._ask(Question(title, found.unasked, "not proved"))
            return
        row = int(few[min(found.row, len(few) - 1)])
        self._ask(
            Question(
                title,
                f"p {found.p_value:.2g} ({len(few)} of {len(self.x):,} rows)",
                "no power" if found.overlap < NO_POWER else "holds",
                f"median of g / (g + q) {found.overlap:.2f}",
            ),
            found.p_value,
            f"the log_prob of {kind}, of the {part}'s site {name!r}, is not that of its draws (first seen in row {row}; p = "
            f"{found.p_value:.0e}): its density does not integrate to 1, or its sample draws from another; log p(x) is wrong by "
            "what it is off; mend log_prob or sample",
        )  # fmt: skip

    def y_of(self, rows: Tensor) -> Tensor | None:
        """Of these rows."""
        return None if self.y is None else self.y[rows.to(self.y.device)]

    def _weights(self, num_rows: int) -> DrawnRows:
        of_model = DrawnRows(self._simulated(num_rows, derive_seed("proof: rows", self.seed)))
        self._reask(of_model)
        names, p_values, variance, asked = of_model.functions()
        smallest, worst = min(zip(p_values.tolist(), names, strict=True))
        found, p_value = min(1.0, len(names) * smallest), 1.0
        if found < ASKED_AGAIN:
            suspects = (p_values < ASKED_AGAIN).nonzero()[:, 0].tolist()
            errors = math.sqrt(-2 * math.log(max(smallest, 1e-300)))  # that S is off by; so many rows make it SURE ones
            more = math.ceil(min(AGAIN, num_rows * max(1.0, (SURE / errors) ** 2)))
            fresh = DrawnRows(self._simulated(more, derive_seed("proof: fresh rows", self.seed), suspects))
            names, p_again, _, asked = fresh.functions()
            smallest, worst = min(zip(p_again.tolist(), names, strict=True))
            found = p_value = min(1.0, len(suspects) * smallest)
        varying = variance[variance > 0]
        tilt = places.TILT / math.sqrt(float(varying.median())) if len(varying) else math.inf
        kind = "holds" if tilt <= MOST_TILT else "no power"
        self._ask(
            Question(
                WEIGHTS,
                f"p {found:.1g}, {len(variance)} functions ({asked:,} rows)",
                kind,
                f"a tilt of {tilt:.2g} nats",
            ),
            p_value,
            "the weights are none: exact draws of the posterior do not stand among the guide's where their weights say (by "
            f"{worst}, p = {p_value:.0e}, {asked:,} rows): a density of guide or model is not that of its draws, or counts on "
            "one side alone; do not use log p(x), and look at masks, Jacobians and log_prob",
        )
        self._reach(of_model)
        return of_model

    def _reask(self, kept: DrawnRows) -> None:
        """Weigh rows that look blind once more, by ten times as many draws: chance, and noise in k, do not make them so twice."""
        still, size = 0, max(1, self._at_once() // MORE_DRAWS)
        for index, (block, suspects) in enumerate(zip(kept.blocks, kept.blind_rows, strict=True)):
            for part, rows in enumerate(suspects.split(size) if len(suspects) else ()):
                seed = derive_seed("proof: blind rows", self.seed, index, part)
                with evaluating(self.program), isolated(), seeded(seed, block.x.device):
                    log_weight = weighed_again(self.program, block, rows, MORE_DRAWS * self.num_samples)
                still += int(blind(log_weight).sum())
        kept.blind = still

    def _reach(self, kept: DrawnRows) -> None:
        missed, rows = kept.blind, kept.rows
        p_value = float(stats.binom.sf(missed - 1, rows, BLIND)) if missed else 1.0
        high = float(stats.beta.ppf(0.95, missed + 1, rows - missed)) if missed < rows else 1.0
        low = float(stats.beta.ppf(0.05, missed, rows - missed + 1)) if missed else 0.0
        share = f"{missed} of {rows:,} rows blind"
        self._ask(
            Question(
                REACH,
                f"{share}; U - L {kept.looseness:.2g} nats",
                "holds",
                f"below {high:.1%} of the posterior missed (95 %)",
            ),
            p_value,
            f"the guide lives on less than the model does: of {rows:,} exact draws of the posterior {missed} have no density "
            f"under it, or outweigh {MORE_DRAWS * self.num_samples:,} of its own, in rows where nothing else warns: {low:.1%} to "
            f"{high:.1%} of the posterior is left out of log p(x), and neither Pareto k nor the standard error tells; give the "
            "guide the modes or the support that it lacks (a mixture, a wider support), or anneal from the prior",
        )

    def _like(self, figures: Tensor, num_rows: int) -> None:
        """Whether L, the effective sample size and the largest weight of data lie where those of drawn rows do."""
        few = spread(len(self.x), min(len(self.x), ROWS, num_rows))
        walk = Walk(self.program, self.x[few], self.y_of(few), rows=self._at_once(), progress=self.progress)
        for block in walk:
            with block, isolated(), seeded(derive_seed("proof: data", self.seed, block.first), block.x.device):
                walk.keep(figures_of(weigh(self.program, block.x, block.y, self.num_samples)[0]))
        p_values = []
        for ours, theirs in zip(torch.cat(walk.kept, 1), figures, strict=True):
            low, high = theirs.min(), theirs.max()
            slack = ROUNDED * (1 + theirs.abs().max())
            beyond = int(((ours < low - slack) | (ours > high + slack)).sum())
            # between the ends of n drawn ones lies all but Beta(2, n - 1) of what is drawn next
            chance = stats.betabinom.sf(beyond - 1, len(ours), 2, len(theirs) - 1) if len(theirs) > 1 else 1.0
            p_values.append(float(chance))
        worst = min(1.0, min(p_values) * len(p_values))
        self._ask(
            Question(
                DATA,
                f"p {worst:.1g} ({len(few)} rows of data)",
                "unlike" if worst <= FAMILY_LEVEL else "holds",
                "" if worst > FAMILY_LEVEL else "the proof, of the model's own rows, does not carry over",
            )
        )

    def _at_once(self) -> int:
        return at_once("importance weights", (self.num_samples + 1) * self.x[0].numel())

    def _simulated(self, num_rows: int, seed: int, chosen: list[int] | None = None) -> Iterator[Simulated]:
        rows = spread(len(self.x), num_rows)
        walk = Walk(self.program, self.x[rows], self.y_of(rows), rows=self._at_once(), progress=self.progress)
        for block in walk:
            found = None
            with block, isolated(), seeded(derive_seed("proof: a block of rows", seed, block.first), block.x.device):
                found = simulated(self.program, block.x, block.y, self.num_samples)
            if found is not None:
                yield (
                    found
                    if chosen is None
                    else replace(found, names=[found.names[i] for i in chosen], values=found.values[..., chosen])
                )


def spread(total: int, number: int) -> Tensor:
    """So many numbers of rows, evenly from all, some of them again where there are fewer."""
    return torch.arange(number) * total // number if number <= total else torch.arange(number) % total
