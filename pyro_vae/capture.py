"""A function of tensors as one compiled graph.

The function is run once under ``make_fx``, which records every tensor operation, those of autograd included, and no
Python: Pyro's handlers, plates and traces are gone from the graph. Inductor then compiles it. What a graph cannot hold (a
value read to the host, structure that changes from run to run, a sampler with a loop that depends on its data) is refused
with the reason. What the function read of Python's state while it was recorded is guarded: :meth:`Captured.stale` says when
the graph no longer stands for the function.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_vae.guard import Guard, hooked
from pyro_vae.inductor import Code, begin_trial, compiled
from pyro_vae.seeding import derive_seed, seeded

VECTOR = 16  # floats in a processor's widest registers
LONG = 128  # elements of a row for which its last part of a vector matters
FEW = 512  # elements of a column up to which MKL is faster along columns; with more it is as fast either way


class Uncapturable(Exception):
    """A function that cannot become one compiled graph; the message says why, in one line."""


class CaptureWarning(UserWarning):
    """Compiling was asked for, or would have paid, and cannot be done."""


class Captured:
    """The compiled graph of a function; called with tensors of the shapes and dtypes it was captured with.

    Random numbers are drawn afresh at every call. On a CPU they are those that eager code draws (Bernoulli variables
    excepted, which are made of uniform ones); on a GPU others, from seeds that
    torch's generator supplies, so that ``torch.manual_seed`` makes them repeatable.
    """

    def __init__(self, code: Code, signature: list[tuple[Any, ...]], out: Any, guard: Guard | None = None) -> None:
        self.flat = code
        """The same of and to flat lists of tensors, under ``torch.no_grad()``; the list of arguments may be emptied."""
        self._signature, self._out, self._guard = signature, out, guard

    def __call__(self, *args: Any) -> Any:
        """The function's value; tensors that the function changes in place are changed in place."""
        with torch.no_grad():
            return tree_unflatten(list(self.flat(tree_flatten(args)[0])), self._out)

    def fits(self, args: Sequence[Tensor]) -> bool:
        """Whether the graph was captured for a flat list of tensors of these shapes, dtypes and devices."""
        return self._signature == signature_of(args)

    def stale(self) -> str | None:
        """What the function would now read otherwise than when it was recorded, as a clause; None where nothing."""
        return None if self._guard is None else self._guard.changed()


def signature_of(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """What a graph is compiled for."""
    return [(tuple(t.shape), t.dtype, t.device) for t in tensors]


class _Recordable(TorchFunctionMode):
    """While entered, ``one_hot`` compares with the numbers of classes: torch's own reads its argument to the host to check it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, or what stands for it."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.one_hot:
            classes = kwargs.get("num_classes", args[1] if len(args) > 1 else -1)
            if classes > 0:
                indices = args[0] if args else kwargs["tensor"]
                return (indices.unsqueeze(-1) == torch.arange(classes, device=indices.device)).to(torch.int64)
        return func(*args, **kwargs)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Garbage waits: a compiler makes objects by the million, and each collection would go through all there are."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@_uncollected()
def capture(
    function: Callable[..., Any],
    example: tuple[Any, ...],
    program: nn.Module | None = None,
    others: Mapping[str, Callable[[], Any]] | None = None,
) -> Captured:
    """Compile a function of (nested lists of) tensors for tensors like those of ``example``.

    Args:
        function: takes and returns tensors, or lists, tuples and dicts of them; may change its arguments in place, and may
            call autograd. It is run twice on copies of ``example``.
        example: its arguments.
        program: a module whose state the function reads, its parameters and buffers being among the arguments.
        others: what else it reads, by the name it has in messages, as functions that give it.

    Returns:
        The compiled function.

    Raises:
        Uncapturable: why it cannot be compiled here.
    """
    flat, structure = tree_flatten(example)
    on_cpu = flat[0].device.type == "cpu"
    if on_cpu:
        begin_trial()
    out: list[Any] = []

    def on_flat(*tensors: Tensor) -> list[Tensor]:
        values, spec = tree_flatten(function(*tree_unflatten(list(tensors), structure)))
        out[:] = [spec]
        return values

    def record() -> tuple[torch.fx.GraphModule, Guard | None]:
        guard = None if program is None else Guard(program, others)
        watching = guard.watching() if guard else nullcontext()
        with seeded(derive_seed("recording"), flat[0].device), watching, _Recordable():
            return make_fx(on_flat)(*(t.detach().clone() for t in flat)), guard

    hook = None if program is None else hooked(program)
    if hook is not None:
        raise Uncapturable(f"the hook on {hook!r} would not be called")
    try:
        (graph, guard), (again, later) = record(), record()
    except Exception as error:
        raise Uncapturable(f"the program cannot be recorded as a graph: {_first_line(error)}") from error
    own = later.differs(guard) if later is not None and guard is not None else None
    if own is not None:
        raise Uncapturable(f"the program changes {own} itself when it runs, and a graph would not")
    if graph.code != again.code:
        raise Uncapturable("the program's structure changes from one run to the next")
    constants = [n for n, c in graph.named_buffers() if not torch.equal(c, again.get_buffer(n))]
    if constants:
        raise Uncapturable("the program makes tensors outside torch's operations that change from one run to the next")
    if on_cpu:
        _separate_biases(graph)
        _whole_vectors(graph)
    try:
        with seeded(derive_seed("recording"), flat[0].device), torch.no_grad():
            code = compiled(graph, flat)
    except Exception as error:
        raise Uncapturable(f"Inductor cannot compile it here: {_first_line(error)}") from error
    return Captured(code, signature_of(flat), out[0], later)


def _separate_biases(graph: torch.fx.GraphModule) -> None:
    """Products first, biases after: these join the activation's loop, and are not copied into the product's memory before."""
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target is aten.addmm.default and not node.kwargs:
            bias, a, b = node.args
            with graph.graph.inserting_before(node):
                product = graph.graph.call_function(aten.mm.default, (a, b))
                product.meta = dict(node.meta)
                total = graph.graph.call_function(aten.add.Tensor, (product, bias))
                total.meta = dict(node.meta)
            node.replace_all_uses_with(total)
            graph.graph.erase_node(node)
    graph.recompile()


def _whole_vectors(graph: torch.fx.GraphModule) -> None:
    """Products of rows that are not whole vectors are made transposed, where few columns are: MKL is a tenth faster along these.

    What is computed of such a product element by element stays transposed, until the next product. Gradients of weights
    (products of a transposed activation) stay as the weights lie, with which they are joined.
    """
    from torch._inductor import inductor_prims

    aten, call = torch.ops.aten, graph.graph.call_function
    views = (aten.t.default, aten.transpose.int, aten.permute.default)
    for node in list(graph.graph.nodes):  # views of the same shape hide who computes what from what
        if (
            node.target in (aten.view.default, aten.alias.default, aten.detach.default)
            and node.args[0].meta["val"].shape == node.meta["val"].shape
        ):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)

    def elementwise(node: torch.fx.Node) -> bool:
        return torch.Tag.pointwise in getattr(node.target, "tags", ())

    def goes_on(node: torch.fx.Node) -> bool:
        """Whether all that is made of it, or of its sum with a bias, is made element by element."""
        return all(elementwise(u) and (u.target is not aten.add.Tensor or goes_on(u)) for u in node.users)

    turned: set[Any] = set()
    for node in list(graph.graph.nodes):
        if node.target is aten.mm.default and node.args[0].target not in views:
            rows, columns = node.meta["val"].shape
            if columns < LONG or columns % VECTOR == 0 or rows > FEW or rows % VECTOR or not goes_on(node):
                continue
            with graph.graph.inserting_before(node):
                a, b = (call(aten.t.default, (factor,)) for factor in node.args)
                back = call(aten.t.default, (call(aten.mm.default, (b, a)),))
            back.meta = dict(node.meta)
            node.replace_all_uses_with(back)
            graph.graph.erase_node(node)
            turned.add(back)
        elif elementwise(node):
            shape = node.meta["val"].shape
            if not any(n in turned and n.meta["val"].shape == shape for n in node.all_input_nodes):
                continue
            turned.add(node)
            if not node.target._schema.is_mutable and any(
                user.target in (*views, aten.mm.default) for user in node.users
            ):
                with graph.graph.inserting_after(node):
                    laid = call(inductor_prims.force_stride_order, (node, (1, shape[0])))
                laid.meta = dict(node.meta)
                node.replace_all_uses_with(laid, delete_user_cb=lambda user, laid=laid: user is not laid)
                turned.add(laid)
    graph.recompile()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
