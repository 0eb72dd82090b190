"""Inductor, asked to compile a graph in less time and to stand aside when it runs.

Beyond ``torch._inductor.compile`` everything here saves time alone, by what lies behind that function: where a version of torch
has no such thing, or another, the graph is compiled and run all the same.

- What a compilation needs of the machine is found out on the second core, while the graph is recorded.
- C++ kernels are compiled together, in as many units as there are compiler processes: half a second of a unit goes into torch's
  headers, and a kernel takes a tenth.
- The code that was generated is called without the layers around it, where these do nothing.
"""

from __future__ import annotations

import atexit
import getpass
import importlib
import inspect
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from threading import Lock, Thread
from types import SimpleNamespace
from typing import Any, NamedTuple

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

CACHE = "TORCHINDUCTOR_CACHE_DIR"
Code = Callable[[list[Tensor]], Sequence[Tensor]]

_alone = Lock()  # of the thread whose graph is being compiled


def compiled(graph: torch.fx.GraphModule, example: list[Tensor]) -> Code:
    """The graph as machine code, called with a list of tensors under ``torch.no_grad()``; the list may be emptied.

    Raises:
        Exception: Inductor's own, of any kind.
    """
    with usable_cache():
        if example[0].device.type != "cpu":
            function = torch._inductor.compile(graph, _shapes_of(example))
            return lambda args: function(*args)
        from torch._inductor import compile_fx  # noqa: F401  takes a second, which the trial is given

        begin_trial().join()
        with _alone, _in_few_units():
            function = torch._inductor.compile(graph, _shapes_of(example), options=ON_CPU)
        return _generated(function, example) or (lambda args: function(*args))


@contextmanager
def usable_cache() -> Iterator[None]:
    """While entered, torch's folder for what it compiles can be written to: its own, or one of this process alone.

    Importing the compiler makes the folder, and so does making an optimizer: without this, one that cannot be made ends all.
    """
    place = os.environ.get(CACHE)
    if _writable(place):
        yield
        return
    os.environ[CACHE] = _own_folder()
    try:
        yield
    finally:
        if place is None:
            del os.environ[CACHE]
        else:
            os.environ[CACHE] = place


@cache
def _writable(place: str | None) -> bool:
    try:
        user = place or os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
        os.makedirs(user, exist_ok=True)
        with tempfile.TemporaryFile(dir=user):
            return True
    except (OSError, KeyError):  # a user without a name has no folder
        return False


@cache
def _own_folder() -> str:
    folder = tempfile.mkdtemp(prefix="pyro-vae-compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def begin_trial() -> Thread:
    """Begin to find out, once in a process, what of torch, Triton and the processor's instructions compiled code depends on.

    Returns:
        The thread that tries the instructions for which there is no saying.
    """
    _import_quietly()
    from torch._inductor import codecache, config, cpu_vec_isa

    for key in ("triton_key", "torch_key"):  # hashes of half a gigabyte, and of thousands of files
        with suppress(AttributeError):
            getattr(codecache, key).prefetch()

    def try_instructions() -> None:
        with suppress(Exception), config.patch({"cpp.vec_isa_ok": True}):  # who compiles hears of it
            cpu_vec_isa.valid_vec_isa_list()

    def compile_headers() -> None:  # six seconds, once on a machine
        trial.join()
        with suppress(Exception), config.patch({"cpp.vec_isa_ok": True}):
            codecache.CppPythonBindingsCodeCache.load_pybinding([], f'{PREFIX}\nextern "C" void kernel() {{}}\n')

    trial = Thread(target=try_instructions, daemon=True)
    trial.start()
    Thread(target=compile_headers, daemon=True).start()
    return trial


def _import_quietly() -> None:
    """Import torch's C++ builder, which says of a machine without CUDA that it has none, where nobody asked for it."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    unasked: Callable[[logging.LogRecord], bool] = lambda record: "No CUDA runtime" not in record.getMessage()  # noqa: E731
    logger.addFilter(unasked)
    try:
        importlib.import_module("torch.utils.cpp_extension")
    finally:
        logger.removeFilter(unasked)


def _shapes_of(tensors: Sequence[Tensor]) -> list[Any]:
    """Stand-ins without values, whose shapes are known to be fixed: Inductor keeps what it compiled for such ones."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    return [mode.from_tensor(t.detach()) for t in tensors]


@contextmanager
def _in_few_units() -> Iterator[None]:
    """While entered, the kernels of each graph are compiled together."""
    from torch._inductor.async_compile import AsyncCompile

    one_by_one, wait = AsyncCompile.cpp_pybinding, AsyncCompile.wait
    graphs: dict[AsyncCompile, _Kernels] = {}

    def cpp_pybinding(self: AsyncCompile, argtypes: list[str], source_code: str, **options: Any) -> Any:
        if options or not _Kernels.fits(source_code):
            return one_by_one(self, argtypes, source_code, **options)
        return graphs.setdefault(self, _Kernels(partial(one_by_one, self), self.submit)).add(argtypes, source_code)

    def wait_for_all(self: AsyncCompile, scope: dict[str, Any]) -> None:
        if self in graphs:
            functions = graphs.pop(self).compiled()
            scope.update({name: functions[k.place] for name, k in scope.items() if isinstance(k, _Kernel)})
        wait(self, scope)

    AsyncCompile.cpp_pybinding, AsyncCompile.wait = cpp_pybinding, wait_for_all  # type: ignore[method-assign]
    try:
        yield
    finally:
        AsyncCompile.cpp_pybinding, AsyncCompile.wait = one_by_one, wait  # type: ignore[method-assign]


class _Kernel(NamedTuple):
    """A kernel that waits for its function: its place in the graph, the types of its arguments and its source."""

    place: int
    argtypes: list[str]
    source: str

    @property
    def name(self) -> str:
        """Its name among others."""
        return f"kernel_{self.place}"


class _Kernels:
    """The kernels of one graph, collected until all are known."""

    def __init__(self, one_by_one: Callable[[list[str], str], Any], submit: Callable[..., Any]) -> None:
        self.one_by_one, self.submit = one_by_one, submit
        self.kernels: list[_Kernel] = []

    @staticmethod
    def fits(source: str) -> bool:
        """Whether a kernel can stand in a namespace: it includes nothing but what all do, and is named once."""
        directives = re.findall(r"^\s*#\s*(?:include|define|undef|if).*", source, re.MULTILINE)
        return [d.strip() for d in directives] == [PREFIX] and len(re.findall(r"\bkernel\b", source)) == 1

    def add(self, argtypes: list[str], source: str) -> _Kernel:
        """Add one; it keeps the place of its function."""
        self.kernels.append(_Kernel(len(self.kernels), argtypes, source))
        return self.kernels[-1]

    def compiled(self) -> list[Callable[..., None]]:
        """A function for each kernel; each is compiled alone, where they cannot be compiled together."""
        from torch._inductor.async_compile import get_compile_threads

        threads = max(1, get_compile_threads())
        units: list[list[_Kernel]] = [[] for _ in range(min(threads, len(self.kernels)))]
        for kernel in sorted(self.kernels, key=lambda k: -len(k.source)):  # the longest first, where the least is
            min(units, key=lambda unit: sum(len(k.source) for k in unit)).append(kernel)
        try:
            submit = self.submit if threads > 1 else None  # which would wait for a lock that it holds itself
            libraries = [(unit, self._library(unit, submit)) for unit in units]
            found = {k.place: getattr(library(), k.name) for unit, library in libraries for k in unit}
            return [found[k.place] for k in self.kernels]
        except Exception:
            alone = [self.one_by_one(k.argtypes, k.source) for k in self.kernels]
            return [f.result() if hasattr(f, "result") else f for f in alone]

    def _library(self, unit: list[_Kernel], submit: Callable[..., Any] | None) -> Callable[[], Any]:
        """Begin to compile kernels together; what it gives waits for their functions, by name."""
        from torch._inductor.codecache import CppPythonBindingsCodeCache

        class Unit(CppPythonBindingsCodeCache):
            """One library with as many Python modules as kernels."""

            cache: dict[str, Any] = {}  # noqa: RUF012

            @classmethod
            def _load_library_inner(cls, path: str, key: str) -> Any:
                found = SimpleNamespace()
                for kernel in unit:
                    one: Any = type(kernel.name, (CppPythonBindingsCodeCache,), {"entry_function": kernel.name})
                    setattr(found, kernel.name, getattr(one._load_library_inner(path, key), kernel.name))
                return found

        parts = ["#define PY_SSIZE_T_CLEAN", PREFIX, *(f"#include <{header}>" for header in BINDING)]
        for kernel in unit:
            arguments = (f"parse_arg<{a.replace('const ', '')}>(args, {n})" for n, a in enumerate(kernel.argtypes))
            binding = Unit.suffix_template.format(
                arg_len=len(kernel.argtypes),
                call_entry_func=f"{kernel.name}({', '.join(arguments)}); Py_RETURN_NONE;",
                entry_func=kernel.name,
                extra_parse_arg="",
            )
            binding = re.sub(r"^\s*#\s*(?:include|define).*", "", binding, flags=re.MULTILINE)
            source = re.sub(r"\bkernel\b", kernel.name, kernel.source.replace(PREFIX, ""))
            parts.append(f"namespace of_{kernel.name} {{\n{source}\n{binding}\n}}")
        library: Callable[[], Any] = Unit.load_async("\n".join(parts) + "\n", "cpu", submit_fn=submit)
        return library


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
