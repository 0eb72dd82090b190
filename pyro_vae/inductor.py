"""Inductor, asked to compile a graph in less time and to stand aside when it runs.

Beyond ``torch._inductor.compile`` everything here saves time alone, by what lies behind that function: where a version of torch
has no such thing, or another, the graph is compiled and run all the same.

- What a compilation needs of the machine is found out on the second core, while the graph is recorded.
- C++ kernels are compiled together, in as many units as there are compiler processes: half a second of a unit goes into torch's
  headers, and a kernel takes a tenth.
- The code that was generated is called without the layers around it, where these do nothing.
"""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

# torch's own generators draw many times faster on a CPU than what Inductor puts into its loops; a tanh made of
# exponentials takes a fraction of the time of its library's; its patterns would join products and biases again; and its
# trial of the processor's vector instructions, which PyTorch uses already, takes 6 s.
ON_CPU = {
    "fallback_random": True,
    "cpp.use_decompose_tanh": True,
    "pattern_matcher": False,
    "cpp.vec_isa_ok": True,
}

PREFIX = "#include <torch/csrc/inductor/cpp_prefix.h>"
BINDING = ("Python.h", "sstream", "cstdlib", "cerrno")  # what a kernel's Python binding includes

Code = Callable[[list[Tensor]], Sequence[Tensor]]


def compiled(graph: torch.fx.GraphModule, example: list[Tensor]) -> Code:
    """The graph as machine code, called with a list of tensors under ``torch.no_grad()``; the list may be emptied.

    Raises:
        Exception: Inductor's own, of any kind.
    """
    on_cpu = example[0].device.type == "cpu"
    if not on_cpu:
        function = torch._inductor.compile(graph, _shapes_of(example))
        return lambda args: function(*args)
    from torch._inductor import compile_fx  # noqa: F401  takes a second, which the trial is given

    if (trial := begin_trial()) is not None:
        trial.join()
    with _in_few_units():
        function = torch._inductor.compile(graph, _shapes_of(example), options=ON_CPU)
    return _generated(function, example) or (lambda args: function(*args))


@functools.cache
def begin_trial() -> Thread | None:
    """Begin to find out, once in a process, what of torch, Triton and the processor's instructions compiled code depends on.

    Returns:
        The thread that tries the instructions for which there is no saying.
    """
    from torch._inductor import codecache, config, cpu_vec_isa

    for key in ("triton_key", "torch_key"):  # hashes of half a gigabyte, and of thousands of files
        with suppress(AttributeError):
            getattr(codecache, key).prefetch()

    def try_instructions() -> None:
        with (
            suppress(Exception),
            config.patch({"cpp.vec_isa_ok": ON_CPU["cpp.vec_isa_ok"]}),
        ):  # who compiles hears of it
            cpu_vec_isa.valid_vec_isa_list()

    trial = Thread(target=try_instructions, daemon=True)
    trial.start()
    return trial


def _shapes_of(tensors: Sequence[Tensor]) -> list[Any]:
    """Stand-ins without values, whose shapes are known to be fixed: Inductor keeps what it compiled for such ones."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    return [mode.from_tensor(t.detach()) for t in tensors]


@contextmanager
def _in_few_units() -> Iterator[None]:
    """While entered, the kernels of each graph are compiled together."""
    from torch._inductor.async_compile import AsyncCompile

    one_by_one = AsyncCompile.cpp_pybinding
    units: dict[AsyncCompile, _Units] = {}

    def cpp_pybinding(self: AsyncCompile, argtypes: list[str], source_code: str) -> Any:
        if not _Units.fits(source_code):
            return one_by_one(self, argtypes, source_code)
        return units.setdefault(self, _Units(self, one_by_one)).add(argtypes, source_code)

    AsyncCompile.cpp_pybinding = cpp_pybinding  # type: ignore[method-assign]
    try:
        yield
    finally:
        AsyncCompile.cpp_pybinding = one_by_one  # type: ignore[method-assign]


class _Units:
    """The kernels of one graph, collected until the first of them is asked for."""

    def __init__(self, compiler: Any, one_by_one: Callable[..., Any]) -> None:
        self.compiler, self.one_by_one = compiler, one_by_one
        self.kernels: list[tuple[list[str], str]] = []

    @staticmethod
    def fits(source: str) -> bool:
        """Whether a kernel can stand in a namespace: it includes nothing but what all do, and has one function to call."""
        directives = re.findall(r"^\s*#\s*(?:include|define|undef|if).*", source, re.MULTILINE)
        return [d.strip() for d in directives] == [PREFIX] and len(re.findall(r"\bkernel\b", source)) == 1

    def add(self, argtypes: list[str], source: str) -> Any:
        """Add one; what it gives waits for its function."""
        from torch._inductor.codecache import LambdaFuture

        place = len(self.kernels)
        self.kernels.append((argtypes, source))
        return LambdaFuture(lambda: self.functions[place])

    @functools.cached_property
    def functions(self) -> list[Callable[..., None]]:
        """One for each kernel; the kernels one by one, where they cannot be compiled together."""
        from torch._inductor.async_compile import get_compile_threads

        groups: list[list[int]] = [[] for _ in range(max(1, min(get_compile_threads(), len(self.kernels))))]
        for place in sorted(range(len(self.kernels)), key=lambda k: -len(self.kernels[k][1])):  # the longest first
            min(groups, key=lambda g: sum(len(self.kernels[k][1]) for k in g)).append(place)
        try:
            loading = [self._unit(group) for group in groups]
            found = {place: f for group, load in zip(groups, loading, strict=True) for place, f in load(group)}
        except Exception:
            alone = [self.one_by_one(self.compiler, *kernel) for kernel in self.kernels]
            return [f.result() if hasattr(f, "result") else f for f in alone]
        return [found[place] for place in range(len(self.kernels))]

    def _unit(self, group: list[int]) -> Callable[[list[int]], Iterator[tuple[int, Callable[..., None]]]]:
        """Begin to compile one unit; what it gives loads it."""
        from torch._inductor.codecache import CppPythonBindingsCodeCache

        class Unit(CppPythonBindingsCodeCache):
            """Where the library of a unit is."""

            cache: dict[str, Any] = {}  # noqa: RUF012

            @classmethod
            def _load_library_inner(cls, path: str, key: str) -> Any:
                return _Library(path, key)

        def names(place: int) -> type[CppPythonBindingsCodeCache]:
            name = f"kernel_{place}"
            return type(name, (CppPythonBindingsCodeCache,), {"entry_function": name})

        parts = ["#define PY_SSIZE_T_CLEAN", PREFIX, *(f"#include <{header}>" for header in BINDING)]
        for place in group:
            argtypes, source = self.kernels[place]
            arguments = ", ".join(f"parse_arg<{a.replace('const ', '')}>(args, {n})" for n, a in enumerate(argtypes))
            name = f"kernel_{place}"
            binding = Unit.suffix_template.format(
                arg_len=len(argtypes),
                call_entry_func=f"{name}({arguments}); Py_RETURN_NONE;",
                entry_func=name,
                extra_parse_arg="",
            )
            text = re.sub(r"\bkernel\b", name, source.replace(PREFIX, ""))
            text += re.sub(r"^\s*#(include|define).*$", "", binding, flags=re.MULTILINE)
            parts.append(f"namespace unit_{place} {{\n{textwrap.dedent(text)}\n}}")
        library = Unit.load_async("\n".join(parts) + "\n", "cpu", submit_fn=self.compiler.submit)

        def load(group: list[int]) -> Iterator[tuple[int, Callable[..., None]]]:
            found = library()
            for place in group:
                module = names(place)._load_library_inner(found.path, found.key)
                yield place, getattr(module, f"kernel_{place}")

        return load


class _Library:
    """A unit's shared library."""

    def __init__(self, path: str, key: str) -> None:
        self.path, self.key = path, key


def _generated(function: Callable[..., Any], example: list[Tensor]) -> Code | None:
    """The code that Inductor generated, where the layers around it do nothing but hand on what they are given; else None.

    They look for profilers, contexts and aliases at every call, which takes a tenth of a short step. What they hand on is seen
    by a call in which something else stands in the place of the generated code; a graph with outputs is left in its layers.
    """
    innermost = inspect.unwrap(function)
    generated = getattr(innermost, "current_callable", None)
    if generated is None:
        return None
    given: list[Any] = []

    def noting(args: list[Any]) -> list[Any]:
        given[:] = args
        return []

    innermost.current_callable = noting
    try:
        with torch.no_grad():
            result = function(*example)
    except Exception:
        return None
    finally:
        innermost.current_callable = generated
    constants, passed = given[: -len(example)], given[-len(example) :]
    if result or len(passed) < len(example) or any(a is not b for a, b in zip(passed, example, strict=True)):
        return None
    return lambda args: generated([*constants, *args])
