"""What a data set held when a run was trained on it, and the same rows found again.

A run keeps a digest of every row (BLAKE2b, 64 bits, of the row as stored), of every split's labels, and of how the rows
were prepared. Whoever loads the data again gets exactly these rows, wherever in the file they now stand, or a
:class:`Changed` error that says what: a training row cannot come into the test split.

A digest costs one to two microseconds a row and two nanoseconds a byte: 0.2 s for the 70,000 rows of MNIST. Of a split with more
than :data:`WHOLE_ROWS` rows or :data:`WHOLE_BYTES` bytes, so many evenly spaced rows are read and no others (3 s at most);
such a split is recognised where it was, and not searched for elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.data import Data
from pyro_vae.data.names import SPLITS
from pyro_vae.data.rows import Rows
from pyro_vae.errors import UserError

WHOLE_ROWS = 2**20
WHOLE_BYTES = 2**30
BLOCK_BYTES = 2**22
REMEDY = "put the data back as they were, or train a new run on what they are now"

Digests = dict[str, Tensor]


class Changed(UserError):
    """Data that are no longer those of the run."""


@dataclass(frozen=True, eq=False)
class Content:
    """The rows that a run was trained, validated and tested on.

    Attributes:
        form: plain values by what they are called in an error: ``kind``, ``shape of a datum``, ``dtype``, ``levels``,
            ``binarization``, ``dequantization``, ``training rows`` and so on.
        rows: split -> int64 ``(n,)``, which rows of the whole array it has; a split that is as filed is left out.
        digests: split -> int64 ``(n,)``, one number per row that was read (:func:`read_rows`); empty where the rows cannot
            be read twice alike (a torch Dataset).
        labels: split -> a digest of its labels; a split without labels is left out.
    """

    form: dict[str, Any]
    rows: dict[str, Tensor]
    digests: Digests
    labels: dict[str, str]

    @property
    def digest(self) -> str:
        """One short digest of all of it."""
        whole = hashlib.blake2b(json.dumps([self.form, self.labels], sort_keys=True).encode(), digest_size=8)
        for part in (self.rows, self.digests):
            for name in sorted(part):
                whole.update(name.encode() + part[name].numpy().tobytes())
        return whole.hexdigest()

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name and plain values, for a file of the run."""
        tensors = {**self.rows, **{f"digest.{split}": d for split, d in self.digests.items()}}
        return tensors, {"form": self.form, "labels": self.labels}

    @classmethod
    def from_file(cls, tensors: dict[str, Tensor], state: Any) -> Content:
        """What :meth:`to_file` gave; ``state`` is None in files of runs that kept row numbers alone."""
        state = state if isinstance(state, dict) else {}
        return cls(
            form=dict(state.get("form", {})),
            rows={split: tensors[split] for split in SPLITS if split in tensors},
            digests={split: tensors[f"digest.{split}"] for split in SPLITS if f"digest.{split}" in tensors},
            labels=dict(state.get("labels", {})),
        )

    def without_rows(self, event_shape: tuple[int, ...]) -> Data:
        """A data set of no rows, prepared as these data were: what others are to be made like, where these are not at hand."""
        levels = self.form.get("levels")
        float_dtype = torch.float64 if self.form.get("dtype") == "float64" else torch.float32
        none = torch.zeros(0, *event_shape, dtype=float_dtype if levels is None else torch.uint8)
        how = {key: self.form.get(key, "none") for key in ("binarization", "dequantization")}
        columns = self.form.get("columns")
        names = None if columns is None else tuple(columns)
        return Data("the data of the run", none, none, none, levels, **how, column_names=names)

    def require_same(self, now: Content, what: str) -> None:
        """:class:`Changed` that names the first difference, unless data at hand are those of the run."""
        require_form(self.form, now.form, what)
        if not self.form:  # of a run that kept row numbers only
            return
        for split, then in self.digests.items():
            require_digests(then, now.digests[split], self.rows.get(split), f"the {split} split of {what}")
        require_labels(self.labels, now.labels, what)


def content_of(data: Data) -> Content:
    """The content of a data set; its rows are read once, and not at all where it was :func:`found <find_rows>` again."""
    data = data if data.plain is None else data.plain
    base = data if data.grey is None else data.grey
    digests = base.digests or {split: digest_rows(base.stored(split)) for split in SPLITS}
    return Content(
        form={
            "kind": "data set",
            "shape of a datum": list(base.event_shape),
            "levels": base.levels,
            "binarization": data.binarization,
            "dequantization": data.dequantization,
            **({} if base.dtype == torch.float32 else {"dtype": "float64"}),
            **({} if base.column_names is None else {"columns": list(base.column_names)}),
            **({} if base.columns is None else {"record": [[c.name, *c.shape] for c in base.columns]}),
            **{f"{split} rows": len(base.stored(split)) for split in SPLITS},
        },
        rows={split: rows for split, rows in base.rows.items() if rows is not None},
        digests=digests,
        labels={split: digest_labels(y) for split, y in base.labels.items() if y is not None},
    )


def content_of_tensor(x: Tensor) -> Content:
    """The content of a tensor ``(N, *event)`` of the user's, all of whose rows train."""
    form = {"kind": "tensor", "shape of a datum": list(x.shape[1:]), "dtype": str(x.dtype), "train rows": len(x)}
    return Content(form=form, rows={}, digests={"train": digest_rows(x)}, labels={})


def content_of_length(n: int) -> Content:
    """What can be kept of a torch Dataset, whose items may be other ones at every reading: how many there are."""
    return Content(form={"kind": "torch Dataset", "train rows": n}, rows={}, digests={}, labels={})


def read_rows(n: int, row_bytes: int) -> Tensor:
    """Which of ``n`` rows are read for their digests: all, or as many as is cheap, evenly spaced from the first to the last."""
    most = max(2, min(WHOLE_ROWS, WHOLE_BYTES // max(1, row_bytes)))
    return torch.arange(n) if n <= most else torch.arange(most) * (n - 1) // (most - 1)


def digest_rows(rows: Rows, where: Tensor | None = None) -> Tensor:
    """Int64 digests of the rows that :func:`read_rows` names: of all, or of those whose numbers ``where`` holds."""
    n = len(rows) if where is None else len(where)
    width = _row_bytes(rows)
    index = read_rows(n, width)
    found = []
    for part in index.split(max(1, BLOCK_BYTES // max(1, width))):
        block = rows[part if where is None else where[part]]
        content = block.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        found += [_digest(content[i * width : (i + 1) * width]) for i in range(len(block))]
    return torch.from_numpy(np.frombuffer(b"".join(found), dtype="<i8").astype(np.int64))


def _row_bytes(rows: Rows) -> int:
    count = 1
    for size in rows.shape[1:]:
        count *= int(size)
    return count * rows.dtype.itemsize


def _digest(content: Any) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()


def digest_labels(y: Tensor) -> str:
    """A digest of the labels of a split."""
    return _digest(y.cpu().numpy().tobytes()).hex()


def find_rows(recorded: Content, x: Rows, names: Sequence[str] | None, what: str) -> dict[str, Tensor]:
    """The rows of a run in an array that may have been re-sorted, or have lost or won rows, since.

    Args:
        recorded: what the run kept.
        x: ``(N, *event)``, the array as it is now.
        names: of the rows (files in a folder), for errors.
        what: the array, for errors.

    Returns:
        Split -> int64 ``(n,)``, rows of ``x`` whose content and order are those of the run's splits.

    Raises:
        Changed: rows are no longer there, or other ones; with how many and the first.
    """
    if not recorded.digests:  # of a run that kept row numbers only
        n = sum(len(rows) for rows in recorded.rows.values())
        if n != len(x):
            raise Changed(f"{what} has {len(x):,} rows, and had {n:,} when the run was trained: {REMEDY}")
        return recorded.rows
    if all(_in_place(recorded, split, x) for split in recorded.rows):
        return recorded.rows
    if any(len(recorded.digests[split]) < len(rows) for split, rows in recorded.rows.items()):
        raise Changed(f"{what} does not hold the rows that the run was trained on in their places: {REMEDY}")
    now = torch.cat([digest_rows(x, part) for part in torch.arange(len(x)).split(WHOLE_ROWS)])
    order = torch.argsort(now, stable=True)
    ordered, found, lost = now[order], {}, 0
    for split, then in recorded.digests.items():
        place = torch.searchsorted(ordered, then).clamp(max=len(ordered) - 1)
        lost += int((ordered[place] != then).sum())
        found[split] = order[place]
    if lost == 0:
        return found
    known = torch.cat(list(recorded.digests.values()))
    new = (~torch.isin(now, known)).nonzero().flatten()
    of = sum(len(rows) for rows in recorded.rows.values())
    first = "" if len(new) == 0 else f"; new or changed is {_row_name(int(new[0]), names)}"
    more = f" (and {len(new) - 1:,} more)" if len(new) > 1 else ""
    raise Changed(
        f"{what} no longer holds {lost:,} of the {of:,} rows that the run was trained, validated and tested on"
        f"{first}{more}: {REMEDY}"
    )


def _row_name(row: int, names: Sequence[str] | None) -> str:
    return f"row {row:,}" if names is None else repr(names[row])


def _in_place(recorded: Content, split: str, x: Rows) -> bool:
    rows, then = recorded.rows[split], recorded.digests[split]
    if len(rows) and int(rows.max()) >= len(x):
        return False
    return torch.equal(digest_rows(x, rows), then)


def require_form(then: dict[str, Any], now: dict[str, Any], what: str) -> None:
    """:class:`Changed` where shape, levels, preparation or a number of rows differ from the run's."""
    for key, value in then.items():
        if now.get(key) != value:
            raise Changed(
                f"{what} is not what the run was trained on: {key} was {_plain(value)} and is now {_plain(now.get(key))}; "
                f"{REMEDY}"
            )


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    return str(tuple(value)) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else str(value)


def require_digests(then: Tensor, now: Tensor, rows: Tensor | None, what: str) -> None:
    """:class:`Changed` where a split's rows are other ones, or in another order."""
    if torch.equal(then, now):
        return
    if then.shape == now.shape:
        differ = (then != now).nonzero().flatten()
        moved = torch.equal(then.sort().values, now.sort().values)
        how = "the same rows stand in another order" if moved else f"{len(differ):,} rows differ, the first is row "
        how += "" if moved else f"{int(differ[0]):,}"
    else:
        how = f"it had {len(then):,} rows and has {len(now):,}"
    raise Changed(f"{what} is not what the run was trained on: {how}; {REMEDY}")


def require_labels(then: dict[str, str], now: dict[str, str], what: str) -> None:
    """:class:`Changed` where labels came, went, or are others."""
    for split in SPLITS:
        if then.get(split) != now.get(split):
            how = "are gone" if split not in now else "are new" if split not in then else "differ"
            raise Changed(f"the labels of the {split} split of {what} {how} since the run was trained: {REMEDY}")
