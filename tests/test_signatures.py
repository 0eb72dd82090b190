"""Numbers, seeds, flags and functions of the wrong kind, at every public function that takes some."""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from contract_programs import Base, rows

import pyro_vae as pv
from pyro_vae.errors import UserError
from pyro_vae.signatures import checked

# public functions of the second rank, beside those of pyro_vae.__all__
SECOND = (
    ("pyro_vae.analysis.imputation", "impute"), ("pyro_vae.analysis.calibration", "sbc"),
    ("pyro_vae.analysis.anomaly", "scores"), ("pyro_vae.analysis.anomaly", "detect"),
    ("pyro_vae.analysis.mcmc", "sample_chains"), ("pyro_vae.programs.latents", "sample_latents"),
)  # fmt: skip
FUNCTIONS = {n: getattr(pv, n) for n in pv._PUBLIC if inspect.isfunction(getattr(pv, n))} | {
    name: getattr(importlib.import_module(module), name) for module, name in SECOND
}
WRONG: dict[str, tuple[Any, ...]] = {
    "int": (2.5, "5", True, math.nan, None, np.float64(3.0), torch.tensor(1.5)),
    "float": ("0.1", True, math.nan, None, 1j),
    "bool": ("no", 1, None),
    "Callable": (True, "print"),
}
CASES = [
    (name, argument, kind, wrong)
    for name, function in FUNCTIONS.items()
    for argument, parameter in inspect.signature(function).parameters.items()
    for kind in WRONG
    if str(parameter.annotation).partition("[")[0].removesuffix(" | None") == kind
    for wrong in WRONG[kind]
    if not (wrong is None and "None" in str(parameter.annotation))
]


def test_every_plain_argument_of_every_public_function_is_held_to_its_kind() -> None:
    """Found before the program or the data are looked at: there are none here. Over 500 cases, in a second."""
    assert len(CASES) > 500
    for name, argument, kind, wrong in CASES:
        needed = {
            n: None
            for n, p in inspect.signature(FUNCTIONS[name]).parameters.items()
            if p.default is p.empty and p.kind is not p.VAR_KEYWORD
        }
        for other, parameter in inspect.signature(FUNCTIONS[name]).parameters.items():
            if other in needed and str(parameter.annotation) == "int":
                needed[other] = 50  # type: ignore[assignment]
        with pytest.raises(UserError, match=f"{name}: expected {argument} to be ") as caught:
            FUNCTIONS[name](**{**needed, argument: wrong})
        assert "\n" not in str(caught.value), (name, argument, kind, wrong)


def test_numbers_of_numpy_and_torch_are_python_s_afterwards() -> None:
    program, x = Base(), rows(4)
    plain = pv.log_likelihood(program, x, num_samples=30, seed=7)
    for count, seed in ((np.int64(30), np.uint8(7)), (torch.tensor(30), torch.tensor(7))):
        found = pv.log_likelihood(program, x, num_samples=count, seed=seed)  # type: ignore[arg-type]
        assert [type(found.num_samples), type(found.seed)] == [int, int]
        assert torch.equal(found.log_likelihood, plain.log_likelihood)
    huge = [pv.encode(program, x, num_samples=2, seed=s) for s in (-1, 1, 2**63, 2**64 + 1)]
    assert len({float(z.sum()) for z in huge}) == 4  # type: ignore[union-attr]  # no two seeds meet


def test_warnings_point_to_the_caller() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pv.log_likelihood(Base(), 30 * rows(4) + rows(4).exp(), num_samples=2)
    assert {w.filename for w in caught} == {__file__}


def test_what_python_says_of_missing_and_unknown_arguments_stays() -> None:
    @checked
    def function(number: int, *, flag: bool = False) -> int:
        return number + flag

    assert function(3, flag=np.bool_(True)) == 4  # type: ignore[arg-type]
    for call in (lambda: function(), lambda: function(3, flags=True)):  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="argument"):
            call()
