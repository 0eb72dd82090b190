"""What a declared model is made of, and what a step with it costs.

``python -m pyro_vae.cli.costs`` writes it into the package, where ``pyro-vae list models`` reads it without importing torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyro_vae.declared

TABLE = Path(pyro_vae.declared.__file__).with_name("costs.json")

EVENT = (1, 28, 28)  # an MNIST image
BATCH = 128  # of a step: what is computed once for all of a batch is shared by so many
UNIT = "mlp"  # the model whose step costs 1


def made_of(name: str) -> dict[str, Any]:
    """The likelihood, the network and the parameters of a declared model on 28 x 28 images, and its multiplications.

    ``flops`` is of one image, forwards, model and guide; None, as the rest, for a program in Python, which is not run.
    """
    from pyro_vae.declared import find
    from pyro_vae.spec import read

    if find("models", name).suffix == ".py":
        return {"likelihood": "its own", "network": "its own", "parameters": None, "flops": None}
    spec = read("models", name)
    program = _outlined(spec)
    return {
        "likelihood": str(spec.likelihood),
        "network": str(spec.network),
        "parameters": None if program is None else sum(p.numel() for p in program.parameters()),
        "flops": None if program is None else _flops(program),
    }


def cost(entry: dict[str, Any], unit: dict[str, Any]) -> str:
    """The cost of a step as so many times that of the unit; empty where it is not known."""
    if not entry["flops"] or not unit["flops"]:
        return ""
    times = entry["flops"] / unit["flops"]
    return f"{times:.1f} x" if times < 9.95 else f"{times:.0f} x"


def _outlined(model: Any) -> Any:
    """The program, without memory, with the default guide or the first one that goes with it."""
    from pyro_vae.declared import names
    from pyro_vae.errors import UserError
    from pyro_vae.spec import DEFAULT_GUIDE, Spec, outline, read

    for guide in (DEFAULT_GUIDE, *names("guides")):
        try:
            return outline(Spec(model=model, guide=read("guides", guide)), EVENT)
        except UserError:
            continue
    return None


def _flops(program: Any) -> float | None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from pyro_vae.programs.labels import needs_y
    from pyro_vae.programs.trace import isolated, trace

    x = torch.zeros(BATCH, *EVENT, device="meta")
    y = torch.zeros(BATCH, dtype=torch.int64, device="meta") if needs_y(program) else None
    try:
        with FlopCounterMode(display=False) as counter, isolated(), torch.no_grad():
            trace(program, x, y, num_samples=1).terms(1, BATCH)
    except (RuntimeError, NotImplementedError, ValueError):  # an operation that has no form without values
        return None
    return float(counter.get_total_flops()) / BATCH


def computed() -> dict[str, dict[str, Any]]:
    """What the table has to hold, by the name of the model."""
    from pyro_vae.declared import names

    found = {name: made_of(name) for name in names("models")}
    return {n: {**e, f"step ({UNIT} = 1)": cost(e, found[UNIT])} for n, e in found.items()}


def table() -> dict[str, dict[str, Any]]:
    """What it holds."""
    found: dict[str, dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in computed().items()]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
