"""Encoder, decoder and density as graphs of tensors, to be run where there is neither Pyro nor this library.

    encoder: x -> the guide's mean of every latent site          decoder: latents -> the mean of p(x | z)
    posterior: x -> the guide's mean and scale of every site     density: x, noise -> log p(x) by importance weights, and the ELBO

They are ``torch.export`` programs (https://docs.pytorch.org/docs/stable/export.html): ``torch.export.load(path).module()``
is called with a batch of any size, on the device that they were exported on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.export import Dim, ExportedProgram

from pyro_vae.errors import UserError, nearest
from pyro_vae.evaluation.draws import Draws
from pyro_vae.evaluation.given_noise import GivenNoise
from pyro_vae.evaluation.importance import block_shape
from pyro_vae.evaluation.methods import ImportanceSampling
from pyro_vae.paths import made, replacing, writable_folder
from pyro_vae.programs.contract import require_program
from pyro_vae.programs.given import event_shape_of
from pyro_vae.programs.labels import needs_y
from pyro_vae.programs.latents import point_of, sample, sample_latents
from pyro_vae.programs.trace import (
    AtValues,
    Program,
    device_of,
    draw_terms,
    dtype_of,
    evaluating,
    innermost,
    isolated,
    latent_sites,
    latent_values,
    observation,
    run,
    y_to_program,
)
from pyro_vae.programs.walk import Walk
from pyro_vae.signatures import checked

PARTS = ("encoder", "decoder")
ALL_PARTS = (*PARTS, "posterior", "density")
ROWS = 3  # of the example; the batch is left open


@checked
def export(
    program: Program,
    out: str | Path | None = None,
    *,
    parts: Sequence[str] = PARTS,
    y: Tensor | None = None,
    event_shape: Any = None,
    num_samples: int = 100,
    onnx: bool = False,
) -> dict[str, ExportedProgram]:
    """Export a program's encoder and decoder.

    Args:
        program: any Program whose guide and likelihood have means in closed form.
        out: a folder to write ``encoder.pt2``, ``decoder.pt2`` and so on into; None to write nothing.
        parts: which of ``encoder``, ``decoder``, ``posterior`` and ``density``.
        y: for a conditional program, three rows of what it is conditioned on, as an example.
        event_shape: of one datum, where the program does not say it as ``program.event_shape``.
        num_samples: K, draws of the density's guide for each row.
        onnx: whether to write each part as ``.onnx`` too, with the same names of outputs; needs onnxscript.

    Returns:
        The exported programs by name, their outputs too. The encoder takes x ``(N, *event)`` and gives a dict of the sites' means
        ``(N, *latent)``; the decoder takes such a dict and gives ``(N, *event)``. A conditional program's take y after it.
        The posterior takes x and gives ``{site}_mean`` and ``{site}_scale``. The density takes x and a list of standard normal or
        uniform numbers ``(K, N, ...)``, as :func:`noise_of` draws them, and gives ``log_likelihood`` and ``elbo``, ``(N,)`` each.

    Raises:
        UserError: a folder that cannot be written into; a part that is unknown, or whose mean has no closed form; a structure
            that ``torch.export`` cannot follow.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.build("ppca", "linear", (3,), latent_dim=2)
        >>> exported = pv.export(vae)
        >>> exported["encoder"].module()(torch.zeros(7, 3))["z"].shape
        torch.Size([7, 2])
    """
    require_program(program)
    for part in parts:
        if part not in ALL_PARTS:
            raise UserError(f"unknown part {part!r}: {nearest(part, ALL_PARTS)}")
    if needs_y(program) and (y is None or len(y) != ROWS):
        raise UserError(f"the program is conditional, model(x, y): give y, {ROWS} rows as an example")
    suffixes = (".pt2", ".onnx") if onnx else (".pt2",)
    if onnx and (importlib.util.find_spec("onnxscript") is None or out is None):
        raise UserError("onnx=True writes files, by onnxscript: give out, and pip install onnx onnxscript")
    folder = (
        None if out is None else writable_folder(out, tuple(part + suffix for part in parts for suffix in suffixes))
    )
    shape = event_shape_of(program, event_shape)
    x = sample(program, ROWS, y, event_shape=shape)
    z = sample_latents(program, ROWS, y, event_shape=shape)
    if not z and (about := [part for part in parts if part != "density"]):
        raise UserError(
            f"the {about[0]} is about latents, and the program has none: export its density, parts=['density']"
        )
    given = () if y is None else (y_to_program(program, y),)
    made_of: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
        "encoder": lambda: (_Encoder(program), (x, *given)),
        "decoder": lambda: (_Decoder(program, shape), (z, *given)),
        "posterior": lambda: (_Posterior(program), (x, *given)),
        "density": lambda: (
            _Density(program, num_samples),
            (x, noise_of(program, x, y, num_samples=num_samples), *given),
        ),
    }
    found = {}
    for part in parts:
        module, args = made_of[part]()
        with evaluating(program), isolated():
            found[part] = _named(_exported(part, module, args))
    if folder is not None:
        with made(folder):
            for part, one in found.items():
                with replacing(folder / f"{part}.pt2") as temporary:
                    torch.export.save(one, temporary)
                if onnx:
                    with replacing(folder / f"{part}.onnx") as temporary:
                        _save_onnx(one, temporary)
    return found


def _save_onnx(program: ExportedProgram, path: Path) -> None:
    names = [str(name) for name in program.graph_signature.user_outputs]
    with contextlib.redirect_stdout(io.StringIO()):  # its progress
        torch.onnx.export(program, f=str(path), output_names=names, external_data=False, verbose=False)


def noise_of(
    program: Program, x: Tensor, y: Tensor | None = None, *, num_samples: int = 100, seed: int = 0
) -> list[Tensor]:
    """The standard normal and uniform numbers ``(num_samples, N, ...)`` by which :func:`pyro_vae.score` draws for rows of x.

    Raises:
        UserError: a guide that draws by other numbers, or not for each row and draw.
    """
    draws = Draws(program, ImportanceSampling(num_samples, seed=seed, streams="content"), num_samples)
    walk = Walk(program, x, y, rows=1)
    for block in walk:
        with block, GivenNoise() as noise:
            parts = draws(block, num_samples, block_shape(x, num_samples)[1])  # as a score is drawn
        each = len(noise.drawn) // len(parts)
        walk.keep([torch.cat(noise.drawn[i::each]) for i in range(each)])
    for drawn in walk.kept[0]:
        if drawn.shape[:2] != (num_samples, 1):
            raise UserError(
                f"random numbers of shape {tuple(drawn.shape)}, and not ({num_samples} draws, 1 row, ...): the program is "
                "run on rows that are folded, and its noise cannot be an input"
            )
    return [torch.cat(parts, 1) for parts in zip(*walk.kept, strict=True)]


def _exported(part: str, module: nn.Module, args: tuple[Any, ...]) -> ExportedProgram:
    shapes = tuple(
        {n: {0: Dim.AUTO} for n in a} if isinstance(a, dict)
        else [{1: Dim.AUTO} for _ in a] if isinstance(a, list)
        else {0: Dim.AUTO} for a in args
    )  # fmt: skip
    try:
        return torch.export.export(module, args, dynamic_shapes=shapes, strict=False)
    except NotImplementedError:
        raise UserError(
            f"the {part} has no mean in closed form to export: choose another guide or likelihood, or the other part"
        ) from None
    except Exception as error:  # the exporter fails in as many ways as a program can be written
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"the {part} cannot be exported: torch.export says {why[:200]!r}") from error


def _named(program: ExportedProgram) -> ExportedProgram:
    """The program with outputs that are called as what they are, and not after the operation that made them."""
    spec, outputs = program.call_spec.out_spec, program.graph.output_node().args[0]
    context = None if spec is None else spec.context
    names = [str(n) for n in context] if isinstance(context, list) else ["mean"]
    taken = {node.target for node in program.graph.nodes if node.op == "placeholder"}
    if not isinstance(outputs, tuple | list) or len(names) != len(outputs):
        return program
    for name, node, told in zip(names, outputs, program.graph_signature.output_specs, strict=True):
        if isinstance(node, torch.fx.Node) and node.op != "placeholder":
            node._rename(f"{name}_mean" if name in taken else name)
            told.arg.name = node.name
    program.graph_module.recompile()
    return program


def _closed_form(fn: Any) -> Tensor:
    """The mode of class numbers, and the mean of anything else, as ``encode`` gives them."""
    mean: Tensor = point_of(fn) if isinstance(innermost(fn), Categorical) else fn.mean
    return mean


class _Encoder(nn.Module):
    def __init__(self, program: Any) -> None:
        super().__init__()
        self.program = program

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        """The means of the latent sites, each given those of the sites before it."""
        return latent_values(run(self.program.guide, x, y, at=AtValues({}, default=_closed_form)))


class _Decoder(nn.Module):
    def __init__(self, program: Any, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.program, self.event_shape = program, event_shape

    def forward(self, latents: dict[str, Tensor], y: Tensor | None = None) -> Tensor:
        """The mean of the data."""
        rows = next(iter(latents.values())).shape[0]
        x = torch.zeros(rows, *self.event_shape, dtype=dtype_of(self.program), device=device_of(self.program))
        traced = run(self.program.model, x, y, at=latents)
        mean: Tensor = traced.nodes[observation(traced)]["fn"].mean
        return mean.expand(rows, *self.event_shape)


class _Posterior(nn.Module):
    def __init__(self, program: Any) -> None:
        super().__init__()
        self.program = program

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        """Means and scales of the latent sites, each given the means of those before it."""
        sites = latent_sites(run(self.program.guide, x, y, at=AtValues({}, default=_closed_form)))
        found = {}
        for name, site in sites.items():
            shape = (x.shape[0], *site["fn"].event_shape)
            found[f"{name}_mean"] = site["fn"].mean.expand(shape)
            found[f"{name}_scale"] = site["fn"].variance.sqrt().expand(shape)
        return found


class _Density(nn.Module):
    def __init__(self, program: Any, num_samples: int) -> None:
        super().__init__()
        self.program, self.num_samples = program, num_samples

    def forward(self, x: Tensor, noise: list[Tensor], y: Tensor | None = None) -> dict[str, Tensor]:
        """Log p(x) by the weights of the draws that the noise makes, and their mean."""
        with GivenNoise(noise):
            log_weight = draw_terms(self.program, x, y, num_samples=self.num_samples).log_weight.double()
        return {"log_likelihood": log_weight.logsumexp(0) - math.log(self.num_samples), "elbo": log_weight.mean(0)}
