"""``pyro-vae train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyro_vae.cli.options import DataRoot, Device, Present, expand, given, refuse_given

if TYPE_CHECKING:
    from pyro_vae.data import Data

BLOCKS = ("prior", "likelihood", "posterior", "encoder", "decoder")
RESUMED = {  # what --resume is told
    "out", "model", "trust_program", "data", "data_root", "device", "resume", "quiet", "tensorboard", "epochs",
    "checkpoint_epochs", "checkpoint_minutes",
}  # fmt: skip


def train(
    ctx: typer.Context,
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A data set, a .npy or .npz file, or a folder of images.")
    ] = "digits",
    model: Annotated[str | None, typer.Option(help="A declared model, or the path of a .toml or .py file.")] = None,
    guide: Annotated[str | None, typer.Option(help="A declared guide, or the path of a .toml file.")] = None,
    prior: Annotated[str | None, typer.Option(metavar="NAME[:key=value,...]", help="Instead of the model's.")] = None,
    likelihood: Annotated[
        str | None, typer.Option(metavar="NAME[:key=value,...]", help="Instead of the model's.")
    ] = None,
    posterior: Annotated[
        str | None, typer.Option(metavar="NAME[:key=value,...]", help="Instead of the guide's.")
    ] = None,
    encoder: Annotated[str | None, typer.Option(metavar="NAME[:key=value,...]", help="Instead of the guide's.")] = None,
    decoder: Annotated[str | None, typer.Option(metavar="NAME[:key=value,...]", help="Instead of the model's.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="dotted.key=value",
            help="Any key of the two specs, or an argument of a .py file's program.",
        ),
    ] = None,
    objective: Annotated[str, typer.Option(metavar="NAME[:key=value,...]", help="What is minimised.")] = "elbo",
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training rows [default: 50].", show_default=False)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.", show_default=False)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step [default: 128].", show_default=False)] = None,
    lr: Annotated[float | None, typer.Option(help="Peak step size [default: 0.002].", show_default=False)] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:key=value,...]",
            help="one-cycle, cosine, constant, exponential or stages [default: one-cycle].",
            show_default=False,
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(metavar="NAME[:key=value,...]", help="One of torch.optim [default: adam].", show_default=False),
    ] = None,
    clip_norm: Annotated[float | None, typer.Option(help="Largest norm of the gradient.", show_default=False)] = None,
    skip_gradients: Annotated[
        float | None, typer.Option(help="Norm of the gradient above which a step is left out.", show_default=False)
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Parts that a minibatch is computed in [default: 1].", show_default=False)
    ] = None,
    average: Annotated[
        float | None,
        typer.Option(help="Decay of the averaged weights, 0 for none [default: 0.999].", show_default=False),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(help="Stop after so many epochs without a better validation value.", show_default=False),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="best (by the objective's validation value), last, or elbo (by the validation ELBO) [default: best].",
            show_default=False,
        ),
    ] = None,
    standardize: Annotated[
        str | None,
        typer.Option(
            help="auto or off: let networks see tables in standard units [default: auto].", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights, the shuffles and the noise.")] = 0,
    device: Device = "auto",
    compile_: Annotated[
        str | None,
        typer.Option(
            "--compile", help="auto, on or off: compile a step into one graph [default: auto].", show_default=False
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="full, tf32 (CUDA) or bf16: of matrix products [default: full].", show_default=False),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or float64: of the weights, and of all arithmetic.")] = "float32",
    binarization: Annotated[
        str | None,
        typer.Option(help="none, static, dynamic or threshold [default: the data set's].", show_default=False),
    ] = None,
    dequantization: Annotated[
        str | None, typer.Option(help="none or uniform [default: uniform under a density].", show_default=False)
    ] = None,
    validation: Annotated[int | None, typer.Option(help="Rows held back for validation.", show_default=False)] = None,
    present: Present = None,
    data_root: DataRoot = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The run directory [default: runs/DATA-MODEL-GUIDE].", show_default=False, callback=expand),
    ] = None,
    checkpoint_epochs: Annotated[
        int | None,
        typer.Option(help="Epochs between two checkpoints [default: what costs little].", show_default=False),
    ] = None,
    checkpoint_minutes: Annotated[
        float | None, typer.Option(help="Minutes between two checkpoints at most.", show_default=False)
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write the metrics to RUN/tensorboard too.")
    ] = False,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="RUN",
            help="Begin with the weights of a run; its model, guide and data where none are given.",
            show_default=False,
            callback=expand,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the run in --out, as it was declared; with more --epochs beyond its end."
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train a model and a guide on DATA, and write a run directory."""
    from pyro_vae.data.names import require_known
    from pyro_vae.errors import UserError

    require_known(data)
    from pyro_vae.training.distributed import launched
    from pyro_vae.training.run import DTYPES, load, read_record

    if resume:
        how = {
            "device": device, "progress": not quiet, "tensorboard": tensorboard, "checkpoint_epochs": checkpoint_epochs,
            "checkpoint_minutes": checkpoint_minutes,
        }  # fmt: skip
        _resume(ctx, data if given(ctx, "data") else None, out, model, data_root, epochs, how)
        return
    parent = None if from_ is None else read_record(from_)
    if parent is not None and not given(ctx, "data"):
        data = parent.get("data", {}).get("name", data)
    if out is None and launched():
        raise UserError("--out is needed under torchrun: every process must name the same run directory")
    if dtype not in ("float32", "float64"):
        raise UserError(f"--dtype {dtype}: expected float32 or float64")
    if epochs is not None and epochs < 1:
        raise UserError(f"--epochs {epochs}: expected at least 1")
    settings: dict[str, Any] = {
        "batch_size": batch_size, "accumulate": accumulate,
        "lr": lr, "schedule": schedule, "optimizer": optimizer, "clip_norm": clip_norm,
        "skip_gradients": skip_gradients,
        "patience": patience,
        "keep": keep,
        "standardize": standardize,
        "compile": compile_,
        "precision": precision,
    }  # fmt: skip
    settings = {k: v for k, v in settings.items() if v is not None}
    if average is not None:
        settings["average"] = average or None
    blocks = dict(zip(BLOCKS, (prior, likelihood, posterior, encoder, decoder), strict=True))
    overrides = {k: v for k, v in blocks.items() if v is not None}
    program, prepared, names = _declare(
        data,
        model,
        guide,
        overrides,
        _assignments(set_ or []),
        seed,
        data_root,
        {"binarization": binarization, "validation": validation, "present": _with_seed(present, seed)},
        dequantization,
        parent,
    )
    if parent is not None and from_ is not None:
        if (own := DTYPES.get(parent["program"].get("dtype"))) is not None:
            program.to(own)
        load(from_, program=program)  # which fills the program, and lets it remember
    if dtype == "float64" or (parent is not None and given(ctx, "dtype")):
        program.to(DTYPES[dtype])
    path = out if out is not None else _free_name(prepared.name, *names)
    _train(
        program,
        prepared,
        epochs=epochs,
        steps=steps,
        out=path,
        device=device,
        tensorboard=tensorboard,
        checkpoint_epochs=checkpoint_epochs,
        checkpoint_minutes=checkpoint_minutes,
        progress=not quiet,
        objective=objective,
        seed=seed,
        **settings,
    )


def _train(program: Any, data: Data, *, out: Path, **arguments: Any) -> None:
    """Fit and report, once however many processes there are; a signal ends it with the status that is usual for it."""
    from pyro_vae.cli.runs import say
    from pyro_vae.training.distributed import is_first
    from pyro_vae.training.fit import fit
    from pyro_vae.training.interrupts import Interrupted

    try:
        run = fit(program, data, out=out, **arguments)
    except Interrupted as interrupted:
        if is_first():
            say(str(interrupted))
        raise typer.Exit(interrupted.status) from None
    if is_first():
        _report(run, say, out)


def _declare(
    name: str,
    model: str | None,
    guide: str | None,
    blocks: dict[str, Any],
    assigned: dict[str, Any],
    seed: int,
    root: str | None,
    preparation: dict[str, Any],
    dequantization: str | None,
    parent: dict[str, Any] | None,
) -> tuple[Any, Data, tuple[str, str]]:
    """The program, the data prepared for its likelihood, and the names the two were declared by."""
    from pyro_vae import registry
    from pyro_vae.data import load_data
    from pyro_vae.declared import find
    from pyro_vae.errors import UserError
    from pyro_vae.programs.file import load_program
    from pyro_vae.spec import DEFAULT_GUIDE, DEFAULT_MODEL, Spec, build, declare

    inherited = parent if model is None and guide is None else None
    if inherited is not None and "model" not in inherited:
        raise UserError("--from: the run was trained on a program of its own file: name it by --model FILE.py")
    model = model or DEFAULT_MODEL
    path = find("models", model)
    if path.suffix == ".py":
        if guide is not None or blocks:
            raise UserError(f"{model} is a whole Pyro program with its own guide: --guide and blocks do not apply")
        data = load_data(name, root, dequantization=dequantization or "none", **preparation)
        return load_program(model, data.event_shape, seed=seed, settings=assigned), data, (path.stem, "own")
    if inherited is None:
        spec = declare(model, guide)
    else:
        spec, model, guide = Spec.from_dict({k: inherited[k] for k in ("model", "guide")}), "from", "run"
    spec = spec.override(blocks | assigned)
    kind = registry.get("likelihoods", spec.model.likelihood.name).data  # type: ignore[attr-defined]
    if kind != "binary" and preparation["binarization"] is None:
        preparation = {**preparation, "binarization": "none"}
    data = load_data(name, root, **preparation)
    if dequantization is None and kind in ("real", "unit") and data.binarization == "none" and (data.levels or 0) > 2:
        dequantization = "uniform"
    if dequantization and dequantization != data.dequantization:
        data = load_data(name, root, dequantization=dequantization, **preparation)
    program = build(spec.model, spec.guide if spec.model.latents else None, data, seed=seed)
    guide = guide or (DEFAULT_GUIDE if spec.model.latents else "own")
    return program, data, (Path(model).stem, Path(guide).stem)


def _resume(
    ctx: typer.Context,
    name: str | None,
    out: Path | None,
    model: str | None,
    root: str | None,
    epochs: int | None,
    how: dict[str, Any],
) -> None:
    from pyro_vae.cli.runs import named_program
    from pyro_vae.errors import UserError
    from pyro_vae.spec import validated
    from pyro_vae.training.run import Run, read_record, rebuild
    from pyro_vae.training.settings import BEFORE, Settings

    if out is None:
        raise UserError("--resume needs --out, the run directory to go on with")
    record = read_record(out)
    others = {p.name for p in ctx.command.params if p.name is not None} - RESUMED
    refuse_given(ctx, others, "--resume goes on with the settings of the run")
    its_own = record.get("data", {}).get("name")
    if name is not None and name != its_own:
        raise UserError(f"--resume goes on with the data of the run, {its_own}: leave out {name}")
    recorded = {"epochs": None, "average": None, **BEFORE, **record.get("training", {})}  # what is None is not recorded
    settings = {"average": None, **validated(Settings, recorded, f"{out}: training").to_dict()}
    program = rebuild(out, record) if model is None else named_program(model, out, record, seed=settings["seed"])
    data = Run(program, out, record).load_data(root)
    if data.source != record["data"] and root is not None:
        data.source.update(record["data"])  # moved to another root: the same data all the same
    if epochs is not None:
        settings["epochs"] = epochs
    _train(program, data, out=out, resume=True, **how, **settings)


def _with_seed(present: str | None, seed: int) -> str | None:
    """What is present, by the run's seed where it says none."""
    said = present is None or any(part.strip().startswith("seed=") for part in present.split(","))
    return present if said else f"{present},seed={seed}"


def _assignments(texts: list[str]) -> dict[str, Any]:
    from pyro_vae.spec import parse_assignment

    return dict(parse_assignment(text) for text in texts)


def _free_name(*names: str) -> Path:
    """``runs/DATA-MODEL-GUIDE``, numbered where it is taken."""
    base = Path("runs") / "-".join(names)
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def _report(run: Any, say: Any, out: Path) -> None:
    last, chosen = run.metrics[-1], run.kept
    best = run.metrics[chosen.epoch - 1]
    figure = (
        f"validation ELBO {-best['validation_loss']:.2f} nats per image"
        if "validation_loss" in best
        else f"training loss {best['train_loss']:.2f} nats per image"
    )
    say(f"trained {last['step']} steps in {sum(m['seconds'] for m in run.metrics):.0f} s: {figure}; {chosen}")
    print(out)
