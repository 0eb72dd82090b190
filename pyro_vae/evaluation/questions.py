"""What a proof of importance weights asks and finds (:mod:`pyro_vae.evaluation.proof`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

WEIGHTS, REACH = "the weights are weights", "the guide reaches"
DENSITIES, FOLDS, DATA = "densities integrate to 1", "maps are one to one", "data like the model's"


@dataclass(frozen=True)
class Question:
    """One thing that must hold.

    Attributes:
        name: the question.
        evidence: what was found.
        verdict: ``holds``, ``fault``, ``no power`` or ``not proved``; of the data ``unlike`` where they are unlike the model's.
        power: what would have been found, in words.
        fault: what to say of it, and what to do, where it is a fault.
        p_value: of the evidence, where it has one.
    """

    name: str
    evidence: str
    verdict: str
    power: str = ""
    fault: str = ""
    p_value: float | None = None


@dataclass(frozen=True)
class Proof:
    """What was found of the weights of a program with data like these.

    Attributes:
        questions: each with its evidence, verdict and power.
        num_rows: simulated rows.
        num_samples: K, draws of the guide for each.
        looseness: mean of U - L in nats, between which E log p(x*) lies; NaN where it is not known.
        seed: of the draws.
    """

    questions: tuple[Question, ...]
    num_rows: int
    num_samples: int
    looseness: float = math.nan
    seed: int = 0

    @property
    def verdict(self) -> str:
        """``fault`` where there is one; ``not proved`` where something could not be asked; else ``proved``.

        Where all holds, of data that are unlike these, it is ``proved for other data``.
        """
        verdicts = {q.verdict for q in self.questions}
        if "fault" in verdicts:
            return "fault"
        if verdicts & {"not proved", "no power"}:
            return "not proved"
        return "proved for other data" if "unlike" in verdicts else "proved"

    @property
    def reaches(self) -> bool:
        """Whether the guide was found to reach where the model is."""
        return any(q.name == REACH and q.verdict == "holds" for q in self.questions)

    @property
    def faults(self) -> list[str]:
        """A line for each fault: figure, cause and remedy."""
        unlike = any(q.verdict == "unlike" for q in self.questions)
        of_model = "on data of the model's own, which these are unlike: "
        return [
            f"{of_model if unlike and q.name in (WEIGHTS, REACH) else ''}{q.fault}"
            for q in self.questions
            if q.verdict == "fault"
        ]

    def summary(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "verdict": self.verdict,
            "num_rows": self.num_rows,
            "num_samples": self.num_samples,
            "looseness": self.looseness if math.isfinite(self.looseness) else None,
            "seed": self.seed,
            "questions": [{k: v for k, v in vars(q).items() if v or v == 0.0} for q in self.questions],
        }

    def table(self) -> list[list[str]]:
        """A row of words for each question, under a heading."""
        return [
            ["question", "evidence", "verdict", "power"],
            *([q.name, q.evidence, q.verdict, q.power] for q in self.questions),
        ]

    def __str__(self) -> str:
        widths = [max(len(row[i]) for row in self.table()) for i in range(4)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in self.table()]
        return "\n".join([f"weights of the guide: {self.verdict}", *lines, *(f"fault: {f}" for f in self.faults)])

    def __repr__(self) -> str:
        return f"<Proof: {self}>"
