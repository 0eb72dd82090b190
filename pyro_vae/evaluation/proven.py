"""What is known of a program's importance weights: its proof, asked where it is not known yet, and kept with the examination."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from pyro_vae.evaluation.blind import discrete_sites
from pyro_vae.evaluation.proof import MOST_ROWS, ROWS, SAMPLES, OwnRows, Proving
from pyro_vae.evaluation.questions import Proof
from pyro_vae.programs.trace import Program, Traces, latent_sites
from pyro_vae.seeding import digest

SHARE = 3000  # draws of a call for which one row more is asked: with those of data a fifteenth of them
MOST_NUMBERS = 2**22  # of a tensor whose content is compared
MORE = 4  # times the rows that a kept proof was made of: then it is made anew


def proven(program: Program, x: Tensor, y: Tensor | None, traces: Traces, draws: int = 0) -> Proof | None:
    """What is known of the weights of a program with data like these; None of a program without latents.

    What is asked of the model's own rows is kept with the program's examination; what is asked of these rows is asked of them,
    once: where the same tensors come again, unchanged, or others of the same content, it is known.

    Args:
        program, x, y: as in :func:`prove`.
        traces: of the examination.
        draws: of the call, in all: more of them let more rows be asked, of the model's and of these.
    """
    if not latent_sites(traces.model):
        return None
    rows = min(MOST_ROWS, max(ROWS, draws // SHARE))
    kept: _Known | None = traces.known.get(Proof)
    if kept is not None and rows > MORE * kept.rows:
        kept = None
    if kept is not None and kept.same(x, y):
        return kept.proof
    asking = Proving(program, x, y, traces, SAMPLES, 0)
    own = asking.of_model(rows) if kept is None else kept.own
    found = asking.of_data(own, len(x) if kept is None else draws // SHARE)
    traces.known[Proof] = _Known(own, found, x, y, rows if kept is None else kept.rows)
    return found


class _Known:
    """A proof, the data that it was last asked of, and for how many rows of the model's own it was meant."""

    def __init__(self, own: OwnRows, proof: Proof, x: Tensor, y: Tensor | None, rows: int) -> None:
        self.own, self.proof, self.rows = own, proof, rows
        self.data = [None if t is None else (weakref.ref(t), _version(t), _digest(t)) for t in (x, y)]

    def same(self, x: Tensor, y: Tensor | None) -> bool:
        """Whether these are the same tensors, unchanged, or others that hold the same."""
        return all(
            known is t or (known is not None and t is not None and _same(known, t))
            for known, t in zip(self.data, (x, y), strict=True)
        )


def _same(known: Any, tensor: Tensor) -> bool:
    ref, version, digest = known
    return (ref() is tensor and version == _version(tensor)) or (digest is not None and digest == _digest(tensor))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _digest(tensor: Tensor) -> str | None:
    """Of a tensor of the CPU that is not too large: what ``evaluate`` reads from a split is another tensor at every call."""
    if tensor.device.type != "cpu" or tensor.numel() > MOST_NUMBERS:
        return None
    return f"{tensor.dtype} {tuple(tensor.shape)} {digest(tensor)}"


def blind_spots(program: Program, x: Tensor, y: Tensor | None, traces: Traces, draws: int = 0) -> list[str]:
    """What stands against all importance weights of a program: lines with figure, cause and remedy.

    That is what its proof found (:mod:`pyro_vae.evaluation.proof`); and discrete latents, where it is not known that the guide
    draws them all.
    """
    proof, discrete = proven(program, x, y, traces, draws), discrete_sites(traces)
    found = [] if proof is None else [*proof.faults]
    if discrete and proof is not None and not proof.reaches and not found:
        sites = ", ".join(map(repr, discrete))
        found.append(
            f"{len(discrete)} of {len(latent_sites(traces.model))} latent sites ({sites}) are discrete: states that the guide "
            "never draws are missing from log p(x), and neither Pareto k (not given) nor ESS nor the standard error tells; "
            "use discrete latents alone, of 1,024 states or fewer, which log_likelihood sums over exactly, or a guide that draws "
            "them all"
        )
    return found
