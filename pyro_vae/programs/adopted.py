"""A Program made of what was written for Pyro alone: functions, objects that are no module, ``pyro.param``, arguments by name.

    program = pv.adopt(model, guide)
    program = pv.adopt(vae, observed="ys", constants={"beta": 1.0})

The wrapper owns what the program registers: the modules that its functions and objects refer to, and a parameter for each
``pyro.param``, unconstrained, under Pyro's name. Its values come from Pyro's store, where that has the name when the program is
adopted (a program trained by SVI), else from the initial value, drawn when the program first runs. The store is not written to.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from pyro_vae.errors import UserError
from pyro_vae.programs.labels import LABELS
from pyro_vae.programs.references import copied, modules_of
from pyro_vae.programs.trace import dtype_of
from pyro_vae.seeding import ONE_THREAD
from pyro_vae.signatures import checked

MEMBERS = frozenset(dir(nn.Module()))
NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def data_among(program: Any, y: Tensor | None) -> Tensor | None:
    """Rows that stand for data where there are none, for what the model reads of them (a total count): an input of their name."""
    inputs = program.apart(y)[1] if isinstance(program, Adopted) else {}
    return inputs.get(program.data_name({**program.constants, **inputs})) if inputs else None


def take_dtype(program: Any, x: Any) -> None:
    """Let an adopted program that has no numbers yet have those that it makes in the dtype of the data."""
    if isinstance(program, Adopted) and program.first_dtype is None and isinstance(x, Tensor) and x.is_floating_point():
        program.first_dtype = x.dtype


@checked
def adopt(
    program: Any,
    guide: Callable[..., Any] | None = None,
    *,
    observed: str | None = None,
    constants: Mapping[str, Any] | None = None,
    conditioned: tuple[str, ...] = (),
) -> Adopted:
    """A Program of a pair of Pyro functions, or of an object that has them.

    Args:
        program: the model as a function, or an object with ``model`` and ``guide``.
        guide: where the model is given by itself.
        observed: the name of the argument that is the data; by default the first.
        constants: what other arguments are, by name, whole and for every row.
        conditioned: observed sites beside the data whose density is left out: the result is log p(x | what they observe). They
            must not depend on latents.

    Returns:
        A module with ``model(x)`` and ``guide(x)``, or ``(x, y)`` where a required argument is left, or an optional one is called
        y, ys, label or labels. Tensors with a row for each row of x go to arguments by ``inputs={name: tensor}`` of every
        function that takes y.

    Raises:
        UserError: what is no pair of functions; an argument that neither function has.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, pyro_vae as pv
        >>> def model(data):
        ...     with pyro.plate("rows", len(data)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("obs", dist.Normal(z[..., None], 1.0).to_event(1), obs=data)
        >>> def guide(data):
        ...     scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        ...     with pyro.plate("rows", len(data)):
        ...         pyro.sample("z", dist.Normal(data[:, 0] / 2, scale))
        >>> pv.encode(pv.adopt(model, guide), torch.ones(3, 1)).shape
        torch.Size([3])
    """
    if guide is None:
        model, guide = getattr(program, "model", None), getattr(program, "guide", None)
    else:
        model = program
    if not callable(model) or not callable(guide):
        raise UserError(f"adopt: expected a model and a guide, or an object with both, got {type(program).__name__}")
    return Adopted(model, guide, observed, dict(constants or {}), tuple(conditioned))


Layout = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
PACKED_AXES = 7  # of y with inputs in it, one more for each layout: (N, 1, 1, ..., numbers)


class Adopted(nn.Module):
    """See :func:`adopt`."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        observed: str | None = None,
        constants: dict[str, Any] | None = None,
        conditioned: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.observed, self.constants, self.conditioned = observed, constants or {}, conditioned
        self.layouts: list[Layout] = []  # of inputs side by side in y, by the number of its axes
        self.functions = types.SimpleNamespace(model=model, guide=guide)  # in which modules are not looked for
        self.param = nn.Module()
        self.constraints: dict[str, Any] = {}  # of pyro.param, by Pyro's names, as far as they were met
        self.is_complete = False  # whether a run's file has said which parameters there are
        self.first_dtype: torch.dtype | None = None
        known = {n for f in (model, guide) for n in _names(f)}
        missing = [n for n in (*self.constants, *([observed] if observed else [])) if known and n not in known]
        if missing and not any(_takes_any(f) for f in (model, guide)):
            raise UserError(
                f"adopt: model and guide have no argument {missing[0]!r}: expected one of {', '.join(sorted(known))}"
            )
        for function in (model, guide):
            for name, module in modules_of(function).items():
                if not any(module is m for m in self.modules()):
                    name = name.replace(".", "/")
                    self.add_module(f"{name}_{len(self._modules)}" if hasattr(self, name) or not name else name, module)
        store = pyro.get_param_store()
        self.stored = {n: store._params[n].detach().clone() for n in store if "$$$" not in n}
        shape = getattr(getattr(model, "__self__", None), "event_shape", None)
        if shape is not None:
            self.event_shape = shape

    @property
    def model(self) -> _Part:
        """p(z) p(x | z)."""
        return _Part(self, "model")

    @property
    def guide(self) -> _Part:
        """q(z | x)."""
        return _Part(self, "guide")

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The tensors alone: extra state of another kind stays the modules' own."""
        return {n: v for n, v in super().state_dict(*args, **kwargs).items() if isinstance(v, Tensor)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The same, where extra state of another kind is left as it is."""
        own = {n: v for n, v in super().state_dict().items() if not isinstance(v, Tensor)}
        return super().load_state_dict({**own, **state_dict}, strict, assign)

    def expect(self, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]) -> None:
        """Make the parameters of ``pyro.param`` that a file has, by their names, for their values to be filled in."""
        self.is_complete = True
        for name, (shape, dtype) in tensors.items():
            key = name.removeprefix("param.")
            if key != name and key not in self.param._parameters:
                self.param.register_parameter(key, nn.Parameter(torch.zeros(shape, dtype=dtype)))

    def to_store(self) -> None:
        """Write the values of ``pyro.param`` into Pyro's global store, under Pyro's names; nothing else of this library does."""
        store = pyro.get_param_store()
        for name, constraint in self.constraints.items():
            if name in store:
                del store[name]
            parameter: Any = self.param._parameters[parameter_name(name)]
            store.setdefault(name, transform_to(constraint)(parameter.detach().clone()), constraint)

    def with_inputs(self, y: Tensor | None, inputs: Mapping[str, Tensor]) -> Tensor:
        """y and tensors by name side by side, ``(N, 1, ..., numbers)``: what is cut, repeated and moved with x.

        How many axes there are says which layout it is, so that every tensor tells its own, in any thread.
        """
        known = {n for f in vars(self.functions).values() for n in _names(f)}
        for name, value in inputs.items():
            if name not in known and not any(_takes_any(f) for f in vars(self.functions).values()):
                raise UserError(
                    f"inputs: model and guide have no argument {name!r}: expected one of {', '.join(sorted(known))}"
                )
            if not isinstance(value, Tensor) or value.dim() < 1:
                raise UserError(f"inputs: expected {name!r} as a tensor (N, ...), got {type(value).__name__}")
        every = {**({} if y is None else {"": y}), **inputs}
        rows = {len(value) for value in every.values()}
        if len(rows) != 1:
            raise UserError(
                f"inputs: expected as many rows of each, got {', '.join(f'{n}: {len(v)}' for n, v in every.items())}"
            )
        layout = tuple((n, tuple(v.shape[1:]), v.dtype) for n, v in every.items())
        most = 2 / torch.finfo(dtype_of(self)).eps
        for name, value in every.items():
            whole = not value.is_floating_point() and value.dtype != torch.bool and value.numel() > 0
            if whole and float(value.abs().max()) > most:
                raise UserError(
                    f"inputs: {name or 'y'!r} holds whole numbers above {most:,.0f}, which the program's {dtype_of(self)} does "
                    "not hold: number them from 0"
                )
        with ONE_THREAD:
            if layout not in self.layouts:
                self.layouts.append(layout)
        wide = torch.float64 if any(v.dtype == torch.float64 for v in every.values()) else torch.float32
        packed = torch.cat([v.reshape(len(v), -1).to(wide) for v in every.values()], 1)
        return packed.reshape(len(packed), *[1] * (PACKED_AXES - 2 + self.layouts.index(layout)), -1)

    def apart(self, y: Tensor | None) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What :meth:`with_inputs` put together."""
        layout = self.layout_of(y)
        if y is None or not layout:
            return y, {}
        y, found, at = y.reshape(len(y), -1), dict[str, Tensor](), 0
        for name, shape, dtype in layout:
            size = torch.Size(shape).numel()
            value = y[:, at : at + size].reshape(len(y), *shape)
            found[name] = value.to(y.dtype if dtype.is_floating_point else dtype)
            at += size
        return found.pop("", None), found

    def data_name(self, taken: Collection[str], part: str = "model") -> str | None:
        """What the argument is called that is the data: the first that nothing else goes to; None where they have no names."""
        parameters = _parameters(getattr(self.functions, part))
        free = (n for n, p in parameters.items() if n not in taken and p.default in (p.empty, None))
        return self.observed or next(free, next(iter(parameters), None))

    def layout_of(self, y: Tensor | None) -> Layout:
        """Of what :meth:`with_inputs` made; nothing of any other y."""
        number = -1 if y is None else y.dim() - PACKED_AXES
        return self.layouts[number] if 0 <= number < len(self.layouts) else ()

    def __deepcopy__(self, memo: Any) -> Adopted:
        other = Adopted.__new__(Adopted)
        memo[id(self)] = other
        nn.Module.__init__(other)
        other._modules = copy.deepcopy(self._modules, memo)
        for name, value in vars(self).items():
            if name not in ("_modules", "functions"):
                other.__dict__[name] = copy.deepcopy(value, memo)
        other.functions = types.SimpleNamespace(**{n: copied(f, memo) for n, f in vars(self.functions).items()})
        return other


class _Part:
    """The model or the guide of an adopted program, called with x and y."""

    def __init__(self, program: Adopted, name: str) -> None:
        self.__self__, self.__name__ = program, name

    @property
    def __signature__(self) -> inspect.Signature:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter("x", kind)]
        needed, optional = self._left(())
        if self.__self__.layouts or optional:
            parameters.append(inspect.Parameter("y", kind, default=None))
        elif needed:
            parameters.append(inspect.Parameter("y", kind))
        return inspect.Signature(parameters)

    def _left(self, layout: Layout) -> tuple[list[str], list[str]]:
        """The arguments that are no data, constants or inputs: required ones, and optional ones that labels go to."""
        program = self.__self__
        function = getattr(program.functions, self.__name__)
        parameters = _parameters(function)
        given = {*program.constants, *(name for name, _, _ in layout)}
        taken = {program.data_name(given, self.__name__), *given}
        left = {n: p for n, p in parameters.items() if n not in taken and n not in ("args", "kwargs")}
        needed = [n for n, p in left.items() if p.default is p.empty]
        return needed, [n for n, p in left.items() if p.default is not p.empty and n in LABELS]

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Any:
        program = self.__self__
        function = getattr(program.functions, self.__name__)
        parameters, anything = _parameters(function), _takes_any(function)
        layout = program.layout_of(y)
        y, inputs = program.apart(y)
        given = {n: v for n, v in {**program.constants, **inputs}.items() if n in parameters or anything}
        args: list[Any] = []
        data = program.data_name({**program.constants, **inputs}, self.__name__)
        if data is None:
            args.append(x)
        elif data in parameters or anything:
            given[data] = x
        if y is not None:
            needed, optional = self._left(layout)
            names = [*needed, *optional]
            if names:
                given[names[0]] = y
            elif data is None:
                args.append(y)
        by_place = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_ONLY]
        args = [given.pop(n) for n in by_place if n in given] + args
        lacking = [n for n, p in parameters.items() if p.default is p.empty and n not in given]
        if lacking and not args:
            raise UserError(
                f"{self.__name__}: nothing is given for its argument {lacking[0]!r}: constants={{{lacking[0]!r}: ...}} of "
                "pv.adopt for what is the same for all rows, inputs= of the call for a tensor with a row for each, labels as y; "
                "what follows from the data (their number), a function of yours around model and guide fills in"
            )
        hidden: AbstractContextManager[Any] = (
            _Conditioned(program.conditioned, self.__name__ == "guide") if program.conditioned else nullcontext()
        )
        with hidden, _Owned(program):
            return function(*args, **given)


class _Owned(Messenger):
    """Take the values of ``pyro.param`` from the adopting program, which makes a parameter where it has none yet."""

    def __init__(self, program: Adopted) -> None:
        super().__init__()
        self.program = program

    def _pyro_param(self, msg: Any) -> None:
        name = str(msg["name"])
        of_module = (
            getattr(msg["fn"], "__module__", "") == pyro.nn.module.__name__
        )  # a PyroModule that is called says so
        if "$$$" in name or of_module:  # of pyro.module: parameters of a module that the program owns
            return
        held, key = self.program.param, parameter_name(name)
        constraint = msg["kwargs"].get("constraint", constraints.real)
        transform = transform_to(constraint)
        self.program.constraints.setdefault(name, constraint)
        if key not in held._parameters:
            if self.program.is_complete:
                raise UserError(
                    f"pyro.param({name!r}) is none of the parameters that the run was saved with; hand over the program that was "
                    "trained"
                )
            found = self.program.stored.get(name)
            if found is None:
                first = msg["args"][1] if len(msg["args"]) > 1 else msg["kwargs"].get("init_tensor")
                first = first() if callable(first) else first
                if first is None:
                    raise UserError(
                        f"pyro.param({name!r}) has no initial value: give one, or adopt the program after training"
                    )
                found = transform.inv(torch.as_tensor(first).detach())
            held.register_parameter(key, nn.Parameter(found.detach().clone()))
        parameter = held._parameters[key]
        value = parameter if constraint is constraints.real else transform(parameter)
        if value is not parameter:
            value.unconstrained = lambda: parameter  # type: ignore[union-attr]
        msg["value"], msg["done"] = value, True


def parameter_name(name: str) -> str:
    """What a parameter of ``pyro.param`` is called in the wrapper: torch takes no dots, no empty name, none of its members."""
    key = name.replace("%", "%25").replace("/", "%2F").replace(".", "/")
    return f"%{key}" if not key or key in MEMBERS else key


class _Conditioned(Messenger):
    """Leave sites out, by name: what they observe is conditioned on, and what the guide draws of it is no part of q(z | x)."""

    def __init__(self, names: tuple[str, ...], of_guide: bool) -> None:
        super().__init__()
        self.names, self.of_guide = names, of_guide

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names and (msg["is_observed"] or self.of_guide):
            msg["infer"] = {**msg["infer"], "_deterministic": True, "_conditioned": True}


def _signed(function: Any) -> Any:
    return function.forward if isinstance(function, nn.Module) else function


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    function = _signed(function)
    try:
        return {n: p for n, p in inspect.signature(function).parameters.items() if p.kind in NAMED}
    except (TypeError, ValueError):  # of C code
        return {}


def _names(function: Callable[..., Any]) -> list[str]:
    return list(_parameters(function))


def _takes_any(function: Callable[..., Any]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(_signed(function)).parameters.values())
