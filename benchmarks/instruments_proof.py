"""Cells of the instruments' table: how often the proof of weights accuses right programs, and how often it finds faults.

Right programs are asked 500 times each: an alarm is a verdict of ``fault``; of the p-values of the weights' test, exact bounds,
at most 1.3 % may lie below 0.01. Faults of known size are asked 200 times each, at default settings; where the issue of a size is
whether it is found at all, the power is shown and not judged.
"""

from __future__ import annotations

import math

from instruments_checks import Cell, Check, shown, within
from proof_programs import FAULTY, RIGHT, data_of

import pyro_vae as pv
from pyro_vae.errors import UserError

SEEDS, FAULT_SEEDS = 500, 200
SHORT = ("PPCA, guide 0.8 times as wide", "masked elements", "discrete above continuous")  # in the short form
SMALL = 0.013  # share of p-values below 0.01


def level(name: str, size: float) -> list[Check]:
    """Ask a right program again and again."""
    program = RIGHT[name]()
    x, y = data_of(program)
    number = math.ceil(SEEDS * size)
    proofs = [pv.prove(program, x, y, seed=seed) for seed in range(number)]
    alarms = sum(proof.verdict == "fault" for proof in proofs)
    asked = [q for proof in proofs for q in proof.questions if q.p_value is not None]
    small = sum(q.p_value < 0.01 for q in asked if q.p_value is not None) / len(asked)
    unproved = sum(proof.verdict == "not proved" for proof in proofs) / number
    return [
        within(f"alarms of {number}", alarms, 0, 1),
        within("share of p below 0.01", small, 0, SMALL + 4 * math.sqrt(SMALL / len(asked))),
        shown("share not proved, or without power", unproved),
    ]


def found(name: str, size: float) -> list[Check]:
    """Ask a faulty one."""
    make, least = FAULTY[name]
    program = make()
    x, y = data_of(program)
    number, hits = math.ceil(FAULT_SEEDS * size), 0
    for seed in range(number):
        try:
            hits += pv.prove(program, x, y, seed=seed).verdict == "fault"
        except UserError:  # refused by name
            hits += 1
    share = hits / number
    return [within(f"power, {number} seeds", share, least, 1.0) if least else shown(f"power, {number} seeds", share)]


def cells() -> list[Cell]:
    """All of them."""
    right = [
        Cell("proof of right programs", name, lambda size, n=name: level(n, size), name in SHORT) for name in RIGHT
    ]  # type: ignore[misc]
    faulty = [Cell("proof of faults", name, lambda size, n=name: found(n, size), True) for name in FAULTY]  # type: ignore[misc]
    return [*right, *faulty]
