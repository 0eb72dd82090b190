"""What a run keeps of its data, and the same data loaded again.

``rows.safetensors`` holds the :class:`~pyro_vae.data.content.Content` of the data, and ``spec.toml`` a digest of that file in
its table ``rows``. Whatever is loaded for ``evaluate``, ``--resume``, ``report`` and the others is held to it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae.data import DATA_SETS, Data, load_data
from pyro_vae.data.content import Content, content_of, content_of_length, content_of_tensor
from pyro_vae.data.load import load_again
from pyro_vae.data.names import SPLITS
from pyro_vae.data.roots import data_root, no_downloads
from pyro_vae.errors import UserError
from pyro_vae.training.files import Outline, damaged, read_tensors, write_tensors

ROWS = "rows.safetensors"


def keep(data: Any) -> Content:
    """What is kept of data that a program is trained on: a data set of ours, a tensor, or a torch Dataset."""
    if isinstance(data, Data):
        return content_of(data)
    return content_of_tensor(data) if isinstance(data, Tensor) else content_of_length(len(data))


def table(content: Content) -> dict[str, Any]:
    """The table ``rows`` of ``spec.toml``: how many rows each split has, and the digest that ``rows.safetensors`` must have."""
    sizes = {split: content.form[f"{split} rows"] for split in SPLITS if f"{split} rows" in content.form}
    return {**sizes, "digest": content.digest}


def write_content(path: Path, content: Content) -> None:
    """Write ``rows.safetensors`` of the run in ``path``."""
    write_tensors(path / ROWS, *content.to_file())


def read_content(path: Path, record: dict[str, Any]) -> Content | None:
    """What the run in ``path`` kept of its data; None for a run that kept nothing.

    Raises:
        UserError: the file is missing or damaged, or is not the one that the run's ``spec.toml`` speaks of.
    """
    where, wanted = path / ROWS, record.get("rows")
    if wanted is None and not where.is_file():
        return None
    tensors, state = read_tensors(where, lambda found, _: _require_rows(found, where))
    try:
        content = Content.from_file(tensors, state)
        if wanted is not None and content.digest != wanted.get("digest"):
            raise damaged(where, "it is not the file that spec.toml speaks of")
    except (TypeError, ValueError, AttributeError) as error:
        raise error if isinstance(error, UserError) else damaged(where, error) from None
    if not content.digests and any(len(rows) and int(rows.min()) < 0 for rows in content.rows.values()):
        raise damaged(where, "a row has a number below 0")
    return content


def _require_rows(found: dict[str, Outline], where: Path) -> None:
    known = {*SPLITS, *(f"digest.{split}" for split in SPLITS)}
    for name, outline in found.items():
        if name not in known or outline.dtype != torch.int64 or len(outline.shape) != 1:
            raise damaged(where, f"{name!r} is {outline}, and no row numbers or digests of a split")


def load_kept(path: Path | None, record: dict[str, Any], content: Content | None, root: str | None) -> Data:
    """The data set of a run: the rows that it was trained, validated and tested on, prepared as they were then.

    Args:
        path: the run directory, or None for a run in memory.
        record: what its ``spec.toml`` holds.
        content: what a run in memory kept of its data.
        root: the folder where data sets, or the user's own file or folder, now lie.

    Raises:
        UserError: the run was trained on a tensor or a Dataset; data that are missing; data that have changed, and how.
    """
    source = record.get("data")
    if source is None:
        raise UserError(
            f"{path or 'the run'} was trained on data in memory, which have no path: hand them over in Python, "
            "report(run, data=x) or evaluate(run.program, x), or train on a file"
        )
    if path is not None:
        content = read_content(path, record)
    source = _moved(source, root)
    if root is not None:
        return _load(source, content, path)
    with no_downloads():  # nothing is written where a run's record says
        return _load(source, content, path)


def _load(source: dict[str, Any], content: Content | None, path: Path | None) -> Data:
    if content is None:
        return load_data(**source)
    return load_again(source, content, str(path or "the run in memory"))


def _moved(source: dict[str, Any], root: str | None) -> dict[str, Any]:
    """The source with the place where its files lie now; a user's own file or folder keeps its name in another folder."""
    name = source["name"]
    if name in DATA_SETS:
        return source if root is None else {**source, "root": root}
    own = Path(name)
    if root is not None and (data_root(root) / own.name).exists():
        return {**source, "name": os.fspath(data_root(root) / own.name)}
    if not own.exists():
        tried = "" if root is None else f", nor {own.name!r} in {root!r}"
        raise UserError(
            f"the data that the run was trained on are not at {name!r} any more{tried}: move them back, or give the folder "
            "where they lie now by --data-root or root="
        )
    return source
