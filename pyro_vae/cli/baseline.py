"""``pyro-vae baseline``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyro_vae.cli.options import DataRoot, Json, Seed, Split, expand, refuse_given

if TYPE_CHECKING:
    from pyro_vae.baselines.base import Baseline
    from pyro_vae.data import Data

DECLARED = {"set_", "epochs", "from_", "seed", "binarization", "validation"}  # what --resume finds in the directory


def baseline(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="One of pyro-vae list baselines.", show_default=False)],
    data: Annotated[
        str, typer.Argument(metavar="[DATA]", help="A data set, a .npy or .npz file, or a folder of images.")
    ] = "digits",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="key=value", help="An option of the baseline; may be repeated.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="The same as --set epochs=N.", show_default=False)] = None,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="DIR",
            help="Begin with a baseline trained before: the rbm of a dbn.",
            show_default=False,
            callback=expand,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The directory [default: runs/DATA-NAME].", show_default=False, callback=expand),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the baseline in --out; evaluate it anew where it is trained.")
    ] = False,
    samples: Annotated[int, typer.Option(min=1, help="Importance samples per image, where there are latents.")] = 1000,
    chains: Annotated[
        int | None, typer.Option(min=1, help="Of annealing [default: the baseline's].", show_default=False)
    ] = None,
    distributions: Annotated[
        int | None, typer.Option(min=3, help="Of annealing [default: the baseline's].", show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="A random subset of so many images, by a fixed seed.", show_default=False)
    ] = None,
    split: Split = "test",
    seed: Seed = 0,
    binarization: Annotated[
        str | None,
        typer.Option(help="static, dynamic or threshold; none for grey [default: the usual].", show_default=False),
    ] = None,
    validation: Annotated[int | None, typer.Option(help="Rows held back.", show_default=False)] = None,
    data_root: DataRoot = None,
    json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train what the VAE is compared with (a deep belief network, a GAN ...), and print its NLL and how it was computed."""
    from pyro_vae.baselines import training
    from pyro_vae.baselines.base import How
    from pyro_vae.cli.output import deliver
    from pyro_vae.errors import UserError
    from pyro_vae.training.files import write_text
    from pyro_vae.training.progress import Progress
    from pyro_vae.training.run import SPEC, claimed, evaluation_name

    options = {} if epochs is None else {"epochs": epochs}
    if resume:
        if out is None:
            raise UserError("--resume needs --out, the directory to go on with")
        refuse_given(ctx, DECLARED, "--resume goes on with the settings of the baseline")
        record = training.read(out)
        if record["baseline"] != name:
            raise UserError(f"{out} holds a {record['baseline']}, and no {name}: name it as it is")
        seed = record["seed"]
        made, metrics = training.load(out, record)
        rows = training.load_data(out, record, data_root)
    else:
        made, rows, record = _declare(name, data, options, set_, from_, seed, binarization, validation, data_root)
        out, metrics = out or Path("runs") / f"{rows.name}-{name}", []
        with claimed(out):
            training.create(out, record, rows)
    if record["parent"] is not None and not metrics and not (out / "program" / SPEC).is_file():
        made.begin_with(_parent(Path(record["parent"]), record))
    minutes = _train(made, rows, out, record, metrics, visible=not quiet)
    how = How(samples, chains, distributions, limit, split, seed)
    with Progress(100, visible=not quiet, unit="per cent") as bar:
        figures = made.figures(rows, how, lambda share: bar.advance(100 * share, "evaluating"))
    figures = {
        "baseline": name, **figures, "split": split, "binarization": rows.binarization, "images_used": len(rows.train),
        "parameters": sum(p.numel() for p in getattr(made, "program", made).parameters()), "minutes": minutes,
    }  # fmt: skip
    _draw(made, out, seed)
    text = _json(figures)
    where = out / evaluation_name("iw", split)
    deliver(text if json else _table(figures), lambda: write_text(where, text + "\n"), str(where))


def _declare(
    name: str,
    data: str,
    options: dict[str, Any],
    assigned: list[str] | None,
    parent: Path | None,
    seed: int,
    binarization: str | None,
    validation: int | None,
    root: str | None,
) -> tuple[Baseline, Data, dict[str, Any]]:
    from pyro_vae import registry
    from pyro_vae.baselines import training
    from pyro_vae.data import load_data
    from pyro_vae.data.names import require_known
    from pyro_vae.spec import parse_assignment

    kind: Any = registry.get("baselines", name)
    options |= dict(parse_assignment(text) for text in assigned or [])
    if parent is not None:
        options.setdefault("epochs", 0)
        training.read(parent)
    require_known(data)
    how: dict[str, Any] = {"binarization": binarization, "validation": validation}
    grey = kind.kind_of(options) == "grey" and binarization in (None, "none")
    rows = load_data(data, root, **how | ({"binarization": "none"} if grey else {}))
    if grey:
        rows = training.dequantized(rows)
    if parent is None:
        training.require_passes(options)
    made = training.declare(name, options, rows.event_shape, seed)
    made.require(rows)
    record = training.record_of(name, options, rows, seed, None if parent is None else str(parent.absolute()))
    if parent is not None:
        made.begin_with(_parent(parent, record))  # refused before anything is written
    return made, rows, record


def _parent(path: Path, child: dict[str, Any]) -> Baseline:
    """What a baseline begins with; :class:`UserError` where it was trained on other rows, of which some may be tested here."""
    from pyro_vae.baselines import training
    from pyro_vae.errors import UserError

    record = training.read(path)
    ours, theirs = ((r["rows"]["digest"], r["data"]["binarization"]) for r in (child, record))
    if ours != theirs:
        raise UserError(
            f"{path} was trained on other rows, of {record['data']['name']} with binarization {theirs[1]!r}: begin with a "
            "baseline of the same data, --binarization and --validation"
        )
    made, metrics = training.load(path, record)
    if len(metrics) < made.passes:
        raise UserError(
            f"{path} has made {len(metrics)} of {made.passes} passes: pyro-vae baseline {record['baseline']} --out {path} "
            "--resume ends it"
        )
    return made


def _train(
    made: Baseline, rows: Data, out: Path, record: dict[str, Any], metrics: list[Any], *, visible: bool
) -> float:
    """Make the passes that are left, and what follows them: minutes; a signal ends it with the status that is usual for it."""
    from pyro_vae.baselines import training
    from pyro_vae.cli.runs import say
    from pyro_vae.training.interrupts import Interrupted
    from pyro_vae.training.progress import Progress

    try:
        with Progress(made.passes, len(metrics), visible=visible, unit="passe") as bar:
            training.train(made, rows, out, record["seed"], metrics, bar.update)
        return sum(m["seconds"] for m in metrics) / 60 + made.finish(rows, out, record["seed"], visible)
    except Interrupted as interrupted:
        say(str(interrupted))
        raise typer.Exit(interrupted.status) from None


def _draw(made: Baseline, out: Path, seed: int) -> None:
    """Samples as a picture, of images."""
    from pyro_vae.analysis.drawing import image_grid, is_image, save

    if is_image(made.event_shape):
        save(image_grid(made.sample(64, seed)), out / "samples.png")


def _json(figures: dict[str, Any]) -> str:
    import json
    import math

    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
    return json.dumps(plain, indent=2)


def _table(f: dict[str, Any]) -> str:
    """The figures as lines of Markdown."""
    from pyro_vae.cli.evaluate import markdown
    from pyro_vae.evaluation.result import digits, total_error

    error = total_error(f["nll_mc_se"], float("nan") if f["nll_data_se"] is None else f["nll_data_se"])
    rows = [
        ("NLL", f"{digits(f['nll'], error)} nats per image"),
        ("  computed", f["computed"]),
        ("  Monte Carlo error", f"{f['nll_mc_se']:.3f}"),
        (
            "  data error",
            "-" if f["nll_data_se"] is None else f"{f['nll_data_se']:.2f} (N = {f['num_data']}, {f['split']})",
        ),
    ]
    if "bound" in f:
        rows.append(("  bound", f"{digits(f['bound'], error)}, above the NLL if log Z is what it was estimated to be"))
    if "chib_minus_iw" in f:
        rows.append(("  by chains", f"log p(x) {f['chib_minus_iw']:+.2f} against it (N = {f['chib_num_data']})"))
    rows += [
        ("bits per dimension", "-" if f["bits_per_dim"] is None else f"{f['bits_per_dim']:.4f}"),
        ("binarization", f["binarization"]),
        ("training images", f"{f['images_used']:,}"),
        ("parameters", f"{f['parameters']:,}"),
        ("minutes", f"{f['minutes']:.1f}"),
    ]
    return "\n".join([*markdown(["quantity", "value"], rows), *(f"warning: {w}" for w in f["warnings"])])
