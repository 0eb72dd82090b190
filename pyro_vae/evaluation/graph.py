"""A function of tensors as a straight list of tensor operations.

A Pyro program spends a millisecond or two on messengers, distributions and plates each time it runs, and an annealed chain
runs it ten thousand times on the same data. Here it is run once under PyTorch's tracer; what depends on the data alone
(an encoder, a mixture's precisions, pseudo-inputs) is then evaluated once and kept, and what no output needs is dropped:
a gradient needs no log-density.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

Function = Callable[..., tuple[Tensor, ...]]


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
        if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            if not inputs or any(i in known for i in inputs):
                return False
        elif all(i in known for i in inputs):
            known[node] = node.target(*map_arg(node.args, known.get), **map_arg(node.kwargs, known.get))
    kept = [n for n in known if n.op != "get_attr" and any(user not in known for user in n.users)]
    for index, node in enumerate(kept):
        name = f"_folded{index}"
        setattr(module, name, known[node])
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.get_attr(name))
    module.graph.eliminate_dead_code()
    return True
