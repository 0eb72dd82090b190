"""What of Python's state a function read while a graph of it was recorded, and whether that is the same still.

A graph keeps tensor operations and no Python: what the function read of plain attributes, globals and closures stands in it as it
was then. A :class:`Guard` notes these reads while the function runs, and says later, in tens of microseconds, what has changed.

Seen are the attributes of modules, and of the object whose methods an adopted program has (numbers, modes, hooks, functions,
whatever they hold), what modules there are, and the globals and closures of functions that are no library's; of functions their
code, defaults and attributes, of classes their members. What C code keeps for itself, and files, are not seen.
"""

from __future__ import annotations

import abc
import dis
import gc
import inspect
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from operator import itemgetter
from threading import get_ident
from typing import Any

import torch
from torch import nn

from pyro_vae.looks import ABSENT, LIBRARIES, Look, look, of_library, plain_part, short, unchanging
from pyro_vae.seeding import ONE_THREAD

Code = types.CodeType
Function = types.FunctionType
_Named = tuple[str, Callable[[], Any]]  # what something is called, and how it is read
STRUCTURE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "__class__", "__dict__")
# torch has no public way to ask for these
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _uncompiled(program: nn.Module) -> Any:
    """Where ``torch.compile`` wraps a part of the program, let it run as Python: what compiles it reads all that is noted."""
    wrapped = any("_orig_mod" in module._modules for module in program.modules())
    return torch.compiler.set_stance("force_eager") if wrapped else nullcontext()


class Guard:
    """Notes what is read while :meth:`watching`, and says later what of it has changed.

    Args:
        program: the module whose attributes, and those of its submodules, are noted as they are read.
        others: what the function reads besides, by what it is called in messages, as functions that give it.
        unread: names of attributes that are not noted.

    Attributes:
        saw_all: whether globals and closures were noted too, as they are where no profiler was at work.
    """

    def __init__(
        self,
        program: nn.Module,
        others: Mapping[str, Callable[[], Any]] | None = None,
        unread: frozenset[str] = frozenset(),
    ) -> None:
        self.program, self.others = program, dict(others or {})
        self._unread, self.saw_all = unread, False
        self._modules, self._objects = _structure(program), _objects(program)
        self._reads: dict[tuple[int, str], Any] = {}
        self._written: set[tuple[int, str]] = set()
        self._codes: dict[Code, dict[str, Any]] = {}
        self._closed: dict[int, Function] = {}  # functions with closures that ran
        self._ended: types.FrameType | None = None
        self._entries: list[_Entry] = []
        self._own: list[_Entry] = []
        self._frames: list[_Frame] = []
        self._quick: list[tuple[dict[str, Any], str, Any]] = []  # entries that are compared without a call for each
        self._slow: list[_Entry] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While entered, what this thread reads is noted."""
        free = self.saw_all = sys.getprofile() is None  # a profiler at work is left there
        collecting = gc.isenabled()
        with ONE_THREAD, _uncompiled(self.program), _noting(self, {type(thing) for thing in self._objects}):
            gc.disable()  # finalizers, and what others have the collector call, are not the program's reads
            if free:
                sys.setprofile(self._called)
            try:
                yield
            finally:
                if free:
                    sys.setprofile(None)
                if collecting:
                    gc.enable()
                self._note_function()
        self._note()

    def changed(self) -> str | None:
        """What would now be read otherwise, as a clause ("program.beta was 0.1 and is 0.2"); None where nothing would."""
        for frame in self._frames:
            if not frame.same():
                return frame.clause() or _other_structure(self._modules, _structure(self.program))
        entries = self._slow
        for own, name, value in self._quick:
            if own.get(name, ABSENT) is not value:
                entries = self._entries
                break
        for entry in entries:
            if not entry.same():
                return entry.clause()
        return None

    def changes_itself(self) -> bool:
        """Whether what the function read and then wrote is another by now: it changes itself at every run."""
        return any(not entry.same() for entry in self._own)

    def differs(self, first: Guard) -> str | None:
        """A number or the like that this run read and the ``first`` found otherwise: the function changes it itself."""
        was: dict[str, list[Look]] = {}
        for entry in (*first._entries, *first._own):
            was.setdefault(entry.label, []).append(plain_part(entry.look))
        for entry in (*self._entries, *self._own):
            if entry.label in was and plain_part(entry.look) not in was[entry.label]:
                return entry.label
        return None

    def _called(self, frame: types.FrameType, event: str, argument: Any) -> None:
        if event == "call":
            self._codes[frame.f_code] = frame.f_globals
        elif event == "return" and frame.f_code.co_freevars and not frame.f_code.co_flags & inspect.CO_GENERATOR:
            self._note_function()
            self._ended = frame

    def _note_function(self) -> None:
        """Note the function of the frame that ended last, which is among what a frame refers to once it has ended."""
        frame, self._ended = self._ended, None
        if frame is not None and not is_library(str(frame.f_globals.get("__name__"))):
            mine = [f for f in gc.get_referents(frame) if isinstance(f, Function) and f.__code__ is frame.f_code]
            self._closed |= {id(f): f for f in mine}

    def _note(self) -> None:
        """Look at everything that was read."""
        labels = {id(module): f"program.{name}" if name else "program" for name, module, _ in self._modules}
        labels |= {id(thing): type(thing).__name__ for thing in self._objects}
        here, shadows = frozenset(labels), dict[int, set[str]]()
        found, own = list[_Named](), list[_Named]()
        for (key, name), owner in self._reads.items():
            if key not in labels or name in HOOKS or name in self._unread or _structural(owner, name):
                continue
            if (key, name) in self._written:  # read first, as state of before, and then changed
                own.append((f"{labels[key]}.{name}", partial(attribute, owner, name)))
            elif name not in vars(owner) and _of_library(owner, name):
                shadows.setdefault(key, set()).add(name)
            else:
                found.append((f"{labels[key]}.{name}", partial(attribute, owner, name)))
        for _, module, _ in self._modules:
            found += [
                (f"{labels[id(module)]}.{hooks}", partial(attribute, module, hooks))
                for hooks in HOOKS
                if attribute(module, hooks)
            ]
        kinds = dict.fromkeys([*(kind for _, _, kind in self._modules), *map(type, self._objects)])
        found += [(f"class {kind.__name__}", lambda k=kind: k) for kind in kinds if not of_library(kind)]  # type: ignore[misc]
        found += [
            (f"torch's _global{hooks}", partial(attribute, nn.modules.module, f"_global{hooks}")) for hooks in HOOKS
        ]
        codes = {code: scope for code, scope in self._codes.items() if not is_library(str(scope.get("__name__")))}
        found += [*_globals(codes), *_closures(codes, list(self._closed.values())), *self.others.items()]
        self._closed = {}
        self._entries = [_Entry(label, get, here) for label, get in found]
        self._own = [_Entry(label, get, here) for label, get in own]
        self._frames = [_Frame(m, labels[id(m)], frozenset(shadows.get(id(m), ()))) for _, m, _ in self._modules]
        self._quick = [place for entry in self._entries if (place := entry.place())]
        self._slow = [entry for entry in self._entries if not entry.place()]


class _Frame:
    """What every module has: its class, its submodules, hooks (none, if it had none), and no attributes over its class's own."""

    __slots__ = ("_bare", "_free", "_keys", "_kind", "_label", "_module", "_names", "_own", "_parts")

    def __init__(self, module: nn.Module, label: str, names: frozenset[str]) -> None:
        self._module, self._label, self._names = module, label, names
        self._kind, self._own = type(module), vars(module)
        self._keys = self._own.keys()
        self._parts = tuple(self._own["_modules"].items())
        self._free = [hooks for hooks in HOOKS if not self._own[hooks]]
        bare = self._free if self._parts else [*self._free, "_modules"]
        self._bare = itemgetter(*bare, *bare) if bare else lambda _: ()  # twice: of one name it would be no tuple

    def same(self) -> bool:
        """Whether it all is as it was; every call of the library asks this of every module."""
        own = self._own
        return (
            type(self._module) is self._kind
            and (not self._parts or tuple(own["_modules"].items()) == self._parts)
            and not any(self._bare(own))
            and self._keys.isdisjoint(self._names)
        )

    def clause(self) -> str | None:
        """What has changed, but for the structure of submodules."""
        names = [hooks for hooks in self._free if self._own[hooks]] or sorted(self._names.intersection(self._own))
        return f"{self._label}.{names[0]} has changed" if names else None


class _Entry:
    """One thing that was read: what it is called, how it is read again, and how it looked."""

    __slots__ = ("_empty", "_get", "_here", "_unchanging", "_value", "label", "look")

    def __init__(self, label: str, get: Callable[[], Any], here: frozenset[int]) -> None:
        self.label, self._get, self._here = label, get, here
        self._value = get()
        self.look: Look = look(self._value, here)
        self._unchanging = unchanging(self._value)
        self._empty = type(self._value) in (dict, OrderedDict) and not self._value

    def same(self) -> bool:
        """Whether it looks as it did."""
        now = self._get()
        if now is self._value and (self._unchanging or (self._empty and not now)):
            return True
        return look(now, self._here) == self.look

    def place(self) -> tuple[dict[str, Any], str, Any] | None:
        """Where an object holds it itself, if the very same thing there is sure to look the same."""
        if not self._unchanging or not isinstance(self._get, partial) or self._get.func is not attribute:
            return None
        owner, name = self._get.args
        return (vars(owner), name, self._value) if name in vars(owner) else None

    def clause(self) -> str:
        """What has become of it."""
        was, now = short(self._value), short(self._get())
        return f"{self.label} was {was} and is {now}" if was and now else f"{self.label} has changed"


def attribute(owner: Any, name: str) -> Any:
    """What an object, or its class, has under a name; nothing of the user's is run to find it."""
    own = vars(owner)
    if name in own:
        return own[name]
    for kind in type(owner).__mro__:
        if name in vars(kind):
            return vars(kind)[name]
    return ABSENT


def hooked(program: nn.Module) -> str | None:
    """A module or parameter with a hook that is not torch's own: whoever set it wants it called at every step."""
    for name, module in program.named_modules():
        hooks = [hook for kind in HOOKS for hook in attribute(module, kind).values()]
        if any(not is_library(str(getattr(hook, "__module__", type(hook).__module__))) for hook in hooks):
            return name or "the program itself"
    return hooked_parameter(program)


def hooked_parameter(program: nn.Module) -> str | None:
    """A parameter with a hook of its own."""
    named = program.named_parameters()
    return next((n for n, p in named if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)), None)


def is_library(module: str) -> bool:
    """Whether a module, by its name, is of torch, Pyro, this library or their like."""
    return module.partition(".")[0] in LIBRARIES


def _of_library(owner: nn.Module, name: str) -> bool:
    return next((is_library(k.__module__) for k in type(owner).__mro__ if name in vars(k)), False)


def _structural(owner: nn.Module, name: str) -> bool:
    """Whether a name stands for a parameter, a buffer or a submodule, which graphs take as they are, or for Pyro's own."""
    own = vars(owner)
    if name in own:
        return name in STRUCTURE or name.startswith("_pyro_")
    held = ("_parameters", "_buffers", "_modules", "_pyro_params", "_pyro_samples")
    return name in STRUCTURE or any(name in own.get(kind, ()) for kind in held)


def _structure(program: nn.Module) -> list[tuple[str, nn.Module, type]]:
    return [(name, module, type(module)) for name, module in program.named_modules()]


def _other_structure(was: list[tuple[str, nn.Module, type]], now: list[tuple[str, nn.Module, type]]) -> str:
    before = {name: (module, kind) for name, module, kind in was}
    for name, module, kind in now:
        if name not in before:
            return f"the submodule {name!r} was added"
        if before[name] != (module, kind):
            return f"the submodule {name!r} was replaced"
    gone = sorted(set(before) - {name for name, _, _ in now})
    return f"the submodule {gone[0]!r} was removed" if gone else "the submodules have another order"


# Reads and writes of attributes, seen by whoever watches: by nobody most of the time, when classes are as they were made.

GET, SET = "__getattribute__", "__setattr__"


def _objects(program: nn.Module) -> list[Any]:
    """Objects that are no modules, whose methods a program has in its attributes: those of an adopted pair."""
    found: dict[int, Any] = {}
    for module in program.modules():
        for held in list(vars(module).values()):
            for method in vars(held).values() if isinstance(held, types.SimpleNamespace) else (held,):
                thing = method.__self__ if isinstance(method, types.MethodType) else None
                plain = type(type(thing)) in (type, abc.ABCMeta) and hasattr(thing, "__dict__")
                if plain and not isinstance(thing, nn.Module) and not of_library(type(thing)):
                    found[id(thing)] = thing
    return list(found.values())


@contextmanager
def _noting(guard: Guard, kinds: set[type]) -> Iterator[None]:
    """While entered, a guard is told of reads and writes of the attributes of modules, and of objects of these classes."""
    saved = [
        (kind, {name: vars(kind)[name] for name in (GET, SET) if name in vars(kind)}) for kind in (nn.Module, *kinds)
    ]
    for kind, _ in saved:
        _note_reads(guard, kind, getattr(kind, GET), getattr(kind, SET))
    try:
        yield
    finally:
        for kind, own in reversed(saved):
            for name in (GET, SET):
                setattr(kind, name, own[name]) if name in own else delattr(kind, name)


def _note_reads(guard: Guard, kind: type, get: Any, put: Any) -> None:
    reads, written, thread = guard._reads, guard._written, get_ident()  # others may use the program meanwhile

    def read(self: Any, name: str) -> Any:
        key = id(self), name
        if key not in written and thread == get_ident():
            reads[key] = self
        return get(self, name)

    def write(self: Any, name: str, value: Any) -> None:
        if thread == get_ident():
            written.add((id(self), name))
        put(self, name, value)

    setattr(kind, GET, read)
    setattr(kind, SET, write)


# Globals and closures of the functions that ran.


def _names(code: Code) -> Iterator[tuple[str, list[str]]]:
    """The names that code loads from outside itself, each with the attributes that follow it."""
    root: str | None = None
    path: list[str] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            path.append(instruction.argval)
            continue
        if root is not None:
            yield root, path
        root, path = (instruction.argval if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") else None), []


def _globals(codes: Mapping[Code, dict[str, Any]]) -> Iterable[_Named]:
    for code, scope in codes.items():
        for root, path in _names(code):
            if root in scope and not of_library(scope[root]):
                yield ".".join([str(scope.get("__name__")), root, *path]), partial(_followed, scope, root, path)


def _followed(scope: Mapping[str, Any], root: str, path: list[str]) -> Any:
    """A global, or what of a module it leads to."""
    value = scope.get(root, ABSENT)
    for name in path:
        if not isinstance(value, types.ModuleType):
            break
        value = vars(value).get(name, ABSENT)
    return value


def _closures(codes: Mapping[Code, dict[str, Any]], functions: list[Function]) -> Iterable[_Named]:
    missing = {code for code in codes if set(code.co_freevars) - {"__class__"}} - {f.__code__ for f in functions}
    if missing:  # generators, say: all that Python holds is searched for them
        functions += [f for f in gc.get_referrers(*missing) if isinstance(f, Function) and f.__code__ in missing]
    for function in functions:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__":
                yield f"{name} of {function.__qualname__}", partial(_content, cell)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return ABSENT
