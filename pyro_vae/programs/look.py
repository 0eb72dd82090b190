"""Hold a program to the contract of :mod:`pyro_vae.programs.trace` by running it on eight rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_vae.errors import ProgramError, UserError, said
from pyro_vae.guard import Guard
from pyro_vae.programs.adopted import data_among
from pyro_vae.programs.auxiliary import check_auxiliary
from pyro_vae.programs.columns import layout_of, left_out_values
from pyro_vae.programs.folding import FOLDS, ONCE
from pyro_vae.programs.following import Following, From, densities_reached
from pyro_vae.programs.functional import OfProgram
from pyro_vae.programs.given import refuse_run
from pyro_vae.programs.masks import unvalidated
from pyro_vae.programs.reading import check_reading
from pyro_vae.programs.rows import (
    DRAWS,
    FEW_DRAWS,
    MIXED,
    ORDER,
    ROWS,
    AxesError,
    DependenceError,
    PlaceError,
    differences,
    in_order,
    rounding_of,
)
from pyro_vae.programs.sites import check_latents, check_log_probs, check_shapes, check_sites, raw_log_prob
from pyro_vae.programs.summing import few_states
from pyro_vae.programs.trace import (
    WHOLE,
    AtValues,
    Traced,
    Traces,
    device_of,
    dtype_of,
    evaluating,
    factors,
    innermost,
    is_random,
    isolated,
    latent_values,
    observation,
    observations,
    run,
    trace,
)
from pyro_vae.programs.values import MOVES, are_whole, blank, draw_like, moves_bounds, put_inside
from pyro_vae.seeding import derive_seed, seeded

NOISE = 0.05  # of a parameter's size (of 1 where it is zero), added to see what hides behind a zero
HIDDEN = (
    " (seen with small noise added to the parameters, in {0} rows: some parameters are zero, and hide it until they are trained, "
    "or it is so in batches of many rows alone)"
)


def look_at(program: Any, x: Tensor, y: Tensor | None, guard: Guard, many: int = 0) -> Traces:
    """Hold a program to the contract on eight rows of data.

    Args:
        program: the Program.
        x: data ``(8, *event)``, in the program's dtype and on its device.
        y: what a conditional program is conditioned on, ``(8, ...)``.
        guard: notes what the first run reads.
        many: rows that it is looked at on as well, the eight again and again, where these are more than 17.

    Returns:
        That run, under Pyro's own validation, on 6 draws; where the data are outside of the likelihood's support, draws of it
        stand for them.

    Raises:
        ProgramError, UserError: see :func:`pyro_vae.programs.examination.examined`.
    """
    own = vars(program)
    own[WHOLE] = own.get(WHOLE, False) and (layout_of(program, x) is not None or are_whole(x))
    try:
        return _on_a_road(program, x.dim(), lambda: _look_at(program, x, y, guard, many))
    except UserError as error:
        if isinstance(error, ProgramError) or own[WHOLE] or layout_of(program, x) is not None or not are_whole(x):
            raise
        own[WHOLE] = True  # tokens, or classes: what an embedding takes
        try:
            return _on_a_road(program, x.dim(), lambda: _look_at(program, x, y, guard, many))
        except UserError as other:
            own[WHOLE] = False
            raise (other if isinstance(other, ProgramError) else error) from None


def _look_at(program: Any, x: Tensor, y: Tensor | None, guard: Guard, many: int) -> Traces:
    if (layout := layout_of(program, x)) is not None:
        layout.forget()
    with seeded(derive_seed("contract"), x.device), evaluating(program):
        try:
            with guard.watching(), isolated(validate=is_validation_enabled()):
                traces = trace(program, x, y, num_samples=DRAWS)
        except UserError:
            raise
        except Exception as error:
            refuse_run(program, x, y, error)
        check_sites(program, traces, ROWS, x)
        check_latents(traces)
        check_shapes(traces, x)
        if layout is not None:
            layout.states = traces.known[few_states] = few_states(traces)
        for traced in (traces.model, traces.guide):
            for site in traced.nodes.values():
                if is_random(site):
                    site["fn"] = unvalidated(site["fn"])
        with isolated():
            for seen in observations(traces.model):
                put_inside(traces.model.nodes[seen])
            check_log_probs(traces)
            check_auxiliary(program, traces, x, y)
            _Runs(program, x, y).hold(traces)
            _with_noise(program, x, y, many, alone=False)
    return traces


def look_at_model(program: Any, event_shape: tuple[int, ...], y: Tensor | None, guard: Guard, many: int = 0) -> Traces:
    """The same of the model alone, on eight rows that it draws itself."""
    return _on_a_road(program, 1 + len(event_shape), lambda: _look_at_model(program, event_shape, y, guard, many))


def _look_at_model(program: Any, event_shape: tuple[int, ...], y: Tensor | None, guard: Guard, many: int) -> Traces:
    given = data_among(program, y)
    x = torch.zeros(ROWS, *event_shape, device=device_of(program), dtype=dtype_of(program)) if given is None else given
    with seeded(derive_seed("contract of a model alone"), x.device), evaluating(program), isolated():
        with guard.watching():
            traces = _of_model(program, x, y)
        check_sites(program, traces, ROWS)
        x = draw_like(x, traces.model.nodes[observation(traces.model)]["fn"]) if given is None else x
        traces = _of_model(program, x, y)
        check_shapes(traces, x)
        check_log_probs(traces)
        _Runs(program, x, y).hold(traces)
        _with_noise(program, x, y, many, alone=True)
    return traces


def _on_a_road(program: Any, axes: int, look: Callable[[], Traces]) -> Traces:
    """Look at a program whose samples are an axis left of its rows, the fast road; where it takes none, folded into rows.

    The road that it went before is tried first. What is raised is what was said where it came further.
    """
    own = vars(program)
    before = own.get(FOLDS, False)
    known = {key: one for key, one in before.items() if isinstance(key, tuple)} if isinstance(before, dict) else {}
    errors: list[UserError] = []
    for folds in (True, False) if isinstance(before, dict) else (False, True):
        own[FOLDS] = {key: one for key, one in known.items() if key[1] != axes} if folds else False
        try:
            found = look()
            if folds:
                sites = [site for site in found.guide.nodes.values() if is_random(site)]
                own[FOLDS][ONCE, axes] = len(sites) == 1 if sites else known.get((ONCE, axes), False)
            return found
        except UserError as error:
            errors.append(error)
            if isinstance(error, ProgramError) and not isinstance(error, AxesError):
                break
    own[FOLDS] = before
    furthest = max(errors, key=_progress)
    raise furthest if isinstance(furthest, ProgramError) else errors[-1]


def _progress(error: UserError) -> int:
    """How far a program came until it was refused: it ran, its sites stand in the plate of rows, rows stand for themselves."""
    ran, placed = isinstance(error, ProgramError), isinstance(error, ProgramError) and not isinstance(error, PlaceError)
    return ran + placed + isinstance(error, DependenceError) + (ran and not isinstance(error, AxesError)) * 2


def _of_model(program: Any, x: Tensor, y: Tensor | None) -> Traces:
    try:
        return Traces(run(program.model, x, y, num_samples=DRAWS), program=program)
    except UserError:
        raise
    except Exception as error:
        refuse_run(program, x, y, error)


def _with_noise(program: Any, x: Tensor, y: Tensor | None, many: int, *, alone: bool) -> None:
    """The rows once more, and many of them, with small noise added to the parameters; they are put back."""

    def hold(program: Any) -> None:
        try:
            traces = _of_model(program, x, y) if alone else trace(program, x, y, num_samples=DRAWS)
            _Runs(program, x, y, many).hold(traces)
        except DependenceError as error:
            raise DependenceError(f"{error}{HIDDEN.format(max(many, len(ORDER)))}") from None
        except Exception:  # parameters that a program cannot have: nothing can be said
            return

    moved = {
        f"program.{name}": p.detach() + NOISE * torch.randn_like(p) * _size(p)
        for name, p in program.named_parameters()
        if p.is_floating_point() and p.numel()
    }
    if moved or many > len(ORDER):
        with seeded(derive_seed("contract: with noise"), x.device):
            torch.func.functional_call(OfProgram(program, hold), moved)


def _size(parameter: Tensor) -> Tensor:
    size = parameter.detach().square().mean().sqrt()
    return torch.where(size > 0, size, torch.ones_like(size))


class _Runs:
    """A program's runs on eight rows, as they are and mixed; of ``many`` rows, with fewer draws, where these are more than 17."""

    def __init__(self, program: Any, x: Tensor, y: Tensor | None, many: int = 0) -> None:
        self.program, self.x, self.y = program, x, y
        self.order, self.draws = in_order(many), list(MIXED if many <= len(ORDER) else FEW_DRAWS)
        self.layout = layout_of(program, x)
        self.kept = None if self.layout is None else self.layout.covariates(x)

    def hold(self, traces: Traces) -> None:
        """:class:`DependenceError` where a density depends on other rows or draws, or the model on x; inside of ``isolated``."""
        alone = not traces.guide.nodes
        latents = latent_values(traces.model if alone else traces.guide, DRAWS, ROWS)
        if self.layout is not None:
            latents |= left_out_values(self.layout, traces.model, DRAWS, ROWS)
        mixed = {n: v[self.draws][:, list(self.order)] for n, v in latents.items()}
        if not alone:
            self._hold_rows("guide", traces.guide, latents, mixed)
        first = traces.model
        self._hold_conditioned(first, latents)
        if not factors(first):  # of which a likelihood may be written
            try:
                second = self._mixed("model", mixed, blank(self.x, self.kept))
                fns = [traced.nodes[observation(traced)]["fn"] for traced in (first, second)]
                traces.known[MOVES] = moves_bounds(*fns)
                if not differences("model", first, second, self.order, self.draws):
                    self._look_for_readers(latents)
                    return
            except (ProgramError, RuntimeError, ValueError, IndexError):
                pass  # other data that the program cannot be run on

        def again(x: Tensor, at: dict[str, Tensor]) -> Traced:
            with seeded(derive_seed("does the model read x"), x.device):
                return self._called("model", x, self.x, self.y, DRAWS, at)

        check_reading(first, again, self.x, latents, self.kept)
        self._hold_rows("model", first, latents, mixed)
        self._look_for_readers(latents)

    def _look_for_readers(self, latents: dict[str, Tensor]) -> None:
        """Whether the density of any site is made of entries that may be missing and that no guide draws: all are missing here.

        That is followed, and not seen by values: a limit that no draw passes is read all the same.
        """
        if self.layout is None or self.layout.read or not (names := self.layout.left_out()):
            return
        drawn, x = {n: v for n, v in latents.items() if n not in names}, self.layout.without(self.x, names)

        following = Following()
        with seeded(derive_seed("does a site read what is missing"), x.device):
            with following, From(following, names.__contains__):
                traced = run(self.program.model, x, self.y, num_samples=DRAWS, at=_Points(drawn))
            self.layout.read = bool(densities_reached(following, traced, names.__contains__)) or following.left

    def _hold_conditioned(self, first: Traced, latents: dict[str, Tensor]) -> None:
        """What is conditioned on has the same density whatever latents and data are; else it is no log p(x | y) that is left."""
        named = [n for n, s in first.nodes.items() if s["type"] == "sample" and s["infer"].get("_conditioned")]
        if not named:
            return
        for at in (
            {n: _far(first.nodes[n]["fn"], v) for n, v in latents.items()},
            {n: v.flip(0) for n, v in latents.items()},
        ):
            try:
                second = self._run("model", blank(self.x, self.kept), self.y, at, DRAWS, "conditioned sites")
            except ProgramError:  # latents that cannot be so far out
                continue
            for name in named:
                before, after = (raw_log_prob(traced.nodes[name]) for traced in (first, second))
                if before.numel() % ROWS or not torch.equal(before, after):
                    raise DependenceError(
                        f"model: the site {name!r} is conditioned on, and its density depends on the latents, on x or on other "
                        "rows: without it what is left is not log p(x | y); let only sites that depend on y be conditioned on"
                    )

    def _hold_rows(self, part: str, first: Traced, latents: dict[str, Tensor], mixed: dict[str, Tensor]) -> None:
        second = self._mixed(part, mixed, self.x)
        if not differences(part, first, second, self.order, self.draws):
            return

        def again(stream: str = "rows as they are") -> Traced:
            return self._run(part, self.x, self.y, latents, DRAWS, stream)

        first = again()  # at given latents, which no transform remembers having drawn
        rounding = rounding_of(part, first, again)
        found = differences(part, first, second, self.order, self.draws, rounding)
        if not found:
            return
        name, fresh = next(iter(found)), again("rows as they are, again")
        if differences(part, first, fresh, range(ROWS), range(DRAWS), rounding):
            raise DependenceError(
                f"{part}: the density of the site {name!r} is another at every run: random numbers are drawn outside of "
                "pyro.sample; make them a site of model and guide"
            )
        raise DependenceError(
            f"{part}: the density of the site {name!r} in one row depends on the other rows of the batch, on their order or "
            "number, or on other draws: let each row stand for itself (no mean, arange or length over the batch axis, and "
            "what belongs to rows of shape (batch, *event))"
        )

    def _mixed(self, part: str, latents: dict[str, Tensor], x: Tensor) -> Traced:
        order = list(self.order)
        y = None if self.y is None else self.y[order]
        return self._run(part, x[order], y, latents, len(self.draws), "rows mixed", order)

    def _run(
        self, part: str, x: Tensor, y: Tensor | None, latents: Mapping[str, Tensor], draws: int, stream: str,
        order: list[int] | None = None,
    ) -> Traced:  # fmt: skip
        seed = derive_seed("does each row stand for itself", stream)
        try:
            with seeded(seed, x.device):
                held = self.x if order is None else self.x[order]
                return self._called(part, x, held, y, draws, _Points(dict(latents)))
        except (RuntimeError, ValueError, IndexError) as error:
            raise AxesError(
                f"{part}: it does not run on {draws} draws of {len(x)} rows of data, though on {DRAWS} of {ROWS} "
                f"({said(error)}): write the axis of rows as the last of the batch, (num_samples, batch, *event), and what "
                "differs by row as a function of x, not as a table with a place for each"
            ) from error

    def _called(self, part: str, x: Tensor, held: Tensor, y: Tensor | None, draws: int, at: Any) -> Traced:
        """A run on x; of a record its sites are held to ``held``, whatever the program is shown."""
        function = getattr(self.program, part)
        if self.layout is None:
            return run(function, x, y, num_samples=draws, at=at)
        return run(function, held, y, num_samples=draws, at=at, shown=x)


def _far(fn: Any, value: Tensor) -> Tensor:
    """Other draws of a latent, ten times as large where it can be."""
    value = value.flip(0)
    try:
        return 10 * value if bool(fn.support.check(10 * value).all()) else value
    except (NotImplementedError, RuntimeError):  # a class that states no support
        return value


class _Points(AtValues):
    """Give latents their values, but for point masses, whose density elsewhere is none."""

    def _pyro_sample(self, msg: Any) -> None:
        if not isinstance(innermost(msg["fn"]), Delta):
            super()._pyro_sample(msg)
