"""Published Pyro programs as they stand in checkouts of their repositories: how they are found, imported and called.

A checkout is a folder ``OWNER+NAME``. Nothing of it is copied here: a package is imported from its folder; of a script or
notebook that trains on import, :meth:`Checkout.definitions` runs the imports, functions and classes, unchanged.
"""

from __future__ import annotations

import ast
import importlib
import json
import linecache
import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROWS = 24  # of the synthetic data
KINDS = {
    "ordinary": "counted",
    "globals": "a latent site that all rows share",
    "variable-length": "rows of different lengths",
    "coupled-rows": "the density of a row depends on other rows",
    "parts-observed": "several sites that each observe a part of the data",
    "noise-outside-sites": "random numbers drawn outside of pyro.sample",
}


@dataclass(frozen=True)
class Case:
    """A published program, constructed, and data for it.

    ``program`` is the object with ``model`` and ``guide``, or the pair. ``x`` goes to the argument ``Entry.observed``, ``y`` to
    ``Entry.labels``; ``inputs`` are tensors with one row per row of x, ``constants`` go whole, both by name of the argument.
    """

    program: Any
    x: Tensor
    y: Tensor | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    guide: Callable[..., Any] | None = None  # as Pyro's SVI gets it, where that is not the program's own

    @property
    def model_and_guide(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """What Pyro's SVI is given."""
        pair = self.program if isinstance(self.program, tuple) else (self.program.model, self.program.guide)
        return pair[0], self.guide or pair[1]


@dataclass(frozen=True)
class Entry:
    """A line of the list: where a program was published, what trains it there, and which argument is what."""

    name: str
    repository: str
    path: str
    build: Callable[[Checkout], Case]
    objective: str = "Trace_ELBO"
    plates: int = 1  # how deep they nest, which an objective that enumerates is told
    kind: str = "ordinary"
    observed: str = "x"  # the argument that is the data
    labels: str | None = None  # the argument that is y
    conditioned: tuple[str, ...] = ()  # sites that are observed and conditioned on
    positional: tuple[str, ...] = ()  # arguments that have no name to be given by

    @property
    def commit(self) -> str:
        """Of the checkout that the list was written against."""
        return COMMITS[self.repository]

    def arguments(self, case: Case) -> tuple[list[Any], dict[str, Any]]:
        """Of one call of model or guide, as Pyro's SVI makes it."""
        named = {self.observed: case.x, **case.inputs, **case.constants}
        if self.labels is not None:
            named[self.labels] = case.y
        return [named.pop(name) for name in self.positional], named


ENTRIES: dict[str, Entry] = {}
COMMITS = {
    "altdeep/causalML": "d003423c6dcd8c6157c5fb2f23a041d29a2cf015",
    "azizilab/decipher": "9610b317844c8515e077a81abafea07c7494a54c",
    "biomedia-mira/deepscm": "2dbfcde0d1fed63553c993d4abe4a74a59dc05d0",
    "cengc13/d_vae_hea": "84e4084464321a5ad154b1888fee35885ab96e6f",
    "czbiohub/drvish": "108dbf3cddd5b786be1afdde4d1e1b51c5d3f140",
    "czeslaw-milosz/masters-mimuw": "59f3d5a4330a30fa69b606c267057652c333d081",
    "desmond-ong/pplAffComp": "0567b7d1bd1cdc7294c3ddf388c3f591ea186124",
    "hei4/medium-pyro-pixyz": "81606cac762a39b04decb1c5ca31c072ddf1a9a7",
    "ilia-kats/PolarbearPlus": "e8141f1f00352137fb667c91a015cf98b30b58ee",
    "kim-hyunsu/CEVAE-pyro": "ad7fdb5dd3c690a076c6752cddb39bb3824dbdba",
    "messiest/deep-markov-model": "d58ed2972de00cc115c25381270a055a1de426b2",
    "pyro-ppl/pyro": "ff6ae1c9572591791aae8842bcd702fcf0b46fd6",
    "Qbjection/equivariant-pyro": "687bf610c441c60c7ac9a3ad2be8de1af3acbeac",
    "rargelaguet/pyro_tests": "48cf3b5f85431e4b82c97bfe7bc2d154d455933a",
    "scverse/scvi-tools": "93dc4fae21917406673206320c8a3002433c4a5d",
    "SwordShieldMouse/vae-pyro": "70309d08ddfd575b7814bf85571c4196c95588ec",
    "tanaka-hiroki1989/dev_python_dmm_pyro": "52ed93eac4b6e24a2d01b08fd75ac05760ef488b",
    "tzs930/pyro_musicvae": "a71d0a25e974e2acba13ed9cd5c661c1a9494246",
    "ucals/cvae": "d5909f95fe3c87892aad9012032f35865a50b107",
    "wataruhashimoto52/pytorch_examples": "21cfce9eb55d541386b2c210d9d1df2238b2d27a",
    "Ying-Lab/BIOTIC": "a9baf242c4611fed21c90e6d7a1c28b8729c61ec",
    "ZengFLab/scClassifier": "9eb5e9c41ed6fc8e7e5e9f3718a539cc732bde5c",
    "ZengFLab/scPheno": "8fe103838d3f9c65697ce6cb2e696d6a9a2276c1",
    "ZengFLab/SURE": "00ff4e98d5d845880c4fedcc34846ef6b35defbc",
    "ZengFLab/SUREv2": "88a522a8e7f28fa53eafbecadf42bbc62e1d6758",
    "ziatdinovmax/pyroVED": "7807ffb1cb415b3cc76c1e02d52465a8ae0eeae4",
}


def published(
    name: str, repository: str, path: str, **about: Any
) -> Callable[[Callable[..., Case]], Callable[..., Case]]:
    """Put a program on the list, under a name; the decorated function constructs it from the checkout."""

    def register(build: Callable[..., Case]) -> Callable[..., Case]:
        if name in ENTRIES:
            raise ValueError(f"{name} is on the list already")
        if about.get("kind", "ordinary") not in KINDS:
            raise ValueError(f"{name}: kind {about['kind']!r}, expected one of {', '.join(KINDS)}")
        ENTRIES[name] = Entry(name, repository, path, build, **about)
        return build

    return register


@dataclass(frozen=True)
class Checkout:
    """The folder of a repository, and the file of the program in it."""

    root: Path
    path: str

    def package(self, name: str, *folders: str) -> types.ModuleType:
        """The module ``name``, imported as its users do, with the folders of the checkout on the path."""
        for folder in folders or ("",):
            sys.path.insert(0, str(self.root / folder))
        return importlib.import_module(name)

    def definitions(self, *assigned: str, **given: Any) -> types.ModuleType:
        """The imports, functions and classes of a script or notebook, and the top-level names ``assigned``, run as they stand.

        What trains, downloads or plots on import is left out, and so are imports of what is not installed (plotting, mostly).
        ``given`` are names that the left-out lines would have bound.
        """
        file = self.root / self.path
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".ipynb":
            text = _cells(text)
        sys.path.insert(0, str(file.parent))
        module = types.ModuleType(f"{self._packages()}.{file.stem}")
        module.__file__ = str(file)
        module.__package__ = module.__name__.rpartition(".")[0]
        module.__dict__.update(given)
        sys.modules[module.__name__] = module
        linecache.cache[str(file)] = (len(text), None, text.splitlines(keepends=True), str(file))
        for statement in ast.parse(text).body:
            if _wanted(statement, assigned):
                _run(statement, module, str(file))
        return module

    def _packages(self) -> str:
        """The folders above the file as packages whose ``__init__`` is not run, so that relative imports find their files."""
        name, folder = "published", self.root
        for part in ("", *Path(self.path).parts[:-1]):
            if part:
                name, folder = f"{name}.{part}", folder / part
            package = types.ModuleType(name)
            package.__path__ = [str(folder)]
            sys.modules[name] = package
        return name


def _cells(text: str) -> str:
    """The code of a notebook, without the lines that are no Python."""
    cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    lines = "\n".join(cell for cell in cells if not cell.startswith("%%")).splitlines()
    return "\n".join(_MAGIC.sub(r"\1pass", line) for line in lines)


_MAGIC = re.compile(r"^(\s*)[%!].*")  # of a notebook: for the shell, or for IPython


def _wanted(statement: ast.stmt, assigned: tuple[str, ...]) -> bool:
    if isinstance(statement, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id in assigned for target in statement.targets)
    return isinstance(statement, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)


def _run(statement: ast.stmt, module: types.ModuleType, file: str) -> None:
    code = compile(ast.Module([statement], []), file, "exec")
    try:
        exec(code, module.__dict__)
    except Exception:
        if not isinstance(statement, ast.Import | ast.ImportFrom):
            raise


def binary(*shape: int, rows: int = ROWS) -> Tensor:
    """Zeros and ones ``(rows, *shape)``."""
    return (torch.rand(rows, *shape) < 0.5).float()


def grey(*shape: int, rows: int = ROWS) -> Tensor:
    """Values strictly between 0 and 1."""
    return 0.05 + 0.9 * torch.rand(rows, *shape)


def real(*shape: int, rows: int = ROWS) -> Tensor:
    """Standard normal values."""
    return torch.randn(rows, *shape)


def counts(*shape: int, rows: int = ROWS, rate: float = 4.0) -> Tensor:
    """Whole numbers as floats, no row without any."""
    values = torch.poisson(torch.full((rows, *shape), rate))
    values[:, 0] += 1
    return values


def one_hot(classes: int, rows: int = ROWS) -> Tensor:
    """Each row one of the classes, as floats."""
    return torch.nn.functional.one_hot(torch.arange(rows) % classes, classes).float()


def classes(number: int, rows: int = ROWS) -> Tensor:
    """Each row the number of one of the classes, int64 ``(rows,)``."""
    return torch.arange(rows) % number
