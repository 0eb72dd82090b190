"""A function of tensors as a straight list of tensor operations.

A Pyro program spends a millisecond or two on messengers, distributions and plates each time it runs, and an annealed chain
runs it ten thousand times on the same data. Here it is run once under PyTorch's tracer; what depends on the data alone
(an encoder, a mixture's precisions, pseudo-inputs) is then evaluated once and kept, and what no output needs is dropped:
a gradient needs no log-density.

Such a graph keeps parameters and attributes as they were, and is not guarded as a compiled step is (:mod:`pyro_vae.guard`): it is
made for one block of images and lives no longer than the chains of that block, which must see one and the same density
from their first transition to their last. What a ``progress`` callback changes meanwhile is read by the graph of the next block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

Function = Callable[..., tuple[Tensor, ...]]
_ATEN = torch.ops.aten
_SAME_SHAPE = {_ATEN.alias.default, _ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.expand.default}


def captured(function: Function, example: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> Function:
    """``function`` as a graph, or ``function`` itself where a graph could not stand for it.

    Args:
        function: of tensors that are its only varying inputs, to a tuple of tensors; may take gradients inside.
        example: arguments to trace it with.
        other: other arguments of the same shapes, at which the graph must agree with the function.

    Returns:
        The graph; the function itself if it draws random numbers, branches on values, writes into what it
        closes over, or has shapes that depend on values.
    """
    try:
        with torch.no_grad():
            module = make_fx(function)(*example)
            module.graph.eliminate_dead_code()
            if not _fold(module):
                return function
            _shorten(module)
            module.recompile()
            got, want = module(*other), function(*other)
    except Exception:  # whatever the tracer cannot follow runs as it was written
        return function
    same = all(torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True) for a, b in zip(got, want, strict=True))
    return module if same else function


def _fold(module: fx.GraphModule) -> bool:
    """Evaluate once whatever depends on constants alone; False where that would change what the graph computes."""
    known: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            known[node] = getattr(module, str(node.target))
        if node.op != "call_function":
            continue
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags or torch.Tag.dynamic_output_shape in tags:
            return False
        inputs = node.all_input_nodes
        if _mutates(node) and any(i in known for i in inputs) and not _reshapes_own(node, known):
            return False
        if all(i in known for i in inputs):
            args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    kept = [n for n in known if n.op != "get_attr" and any(user not in known for user in n.users)]
    for index, node in enumerate(kept):
        if not isinstance(known[node], Tensor):
            continue  # a list of tensors: its elements are kept
        name = f"_folded{index}"
        module.register_buffer(name, known[node])
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.get_attr(name))
    module.graph.eliminate_dead_code()
    return True


def _mutates(node: fx.Node) -> bool:
    return getattr(getattr(node.target, "_schema", None), "is_mutable", False)


def _reshapes_own(node: fx.Node, known: dict[fx.Node, Any]) -> bool:
    """Whether a node only changes, in place, the shape of a constant that the graph made and nothing else looks at."""
    if torch.Tag.inplace_view not in getattr(node.target, "tags", ()):
        return False
    (source,) = node.all_input_nodes
    return source.op == "call_function" and list(source.users) == [node]


def _shorten(module: fx.GraphModule) -> None:
    """Leave out what returns its input as it is: views to the same shape, one tensor split in one or joined to none."""
    graph = module.graph
    if any(_mutates(node) for node in graph.nodes):
        return
    for node in graph.nodes:
        source = node.all_input_nodes[0] if len(node.all_input_nodes) == 1 else None
        if source is None or node.op != "call_function":
            continue
        whole = node.target is _ATEN.cat.default
        if node.target in _SAME_SHAPE:
            whole = _shape(source) is not None and _shape(source) == _shape(node)
        elif "getitem" in getattr(node.target, "__name__", "") and source.target is _ATEN.split.Tensor:
            whole = _shape(source.all_input_nodes[0]) == _shape(node) is not None
            source = source.all_input_nodes[0]
        if whole:
            node.replace_all_uses_with(source)
    graph.eliminate_dead_code()


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    shape = getattr(node.meta.get("tensor_meta", node.meta.get("val")), "shape", None)
    return None if shape is None else tuple(shape)
