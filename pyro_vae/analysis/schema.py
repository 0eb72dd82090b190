"""Draws and what belongs to them as an ``xarray.DataTree`` in ArviZ's schema, and as a NetCDF file.

Axes have names: ``chain``, ``draw``, ``image`` (its row in the data), for a latent site ``z`` the axis ``z_dim``
(``z_dim_0``, ``z_dim_1`` where it has several), for images ``channel``, ``row`` and ``column``. ArviZ's schema:
https://python.arviz.org/en/stable/schema/schema.html.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from arviz_base import from_dict

from pyro_vae.errors import UserError
from pyro_vae.paths import replacing, writable
from pyro_vae.programs.trace import OBSERVED, Traces, latent_sites, observations

IMAGE_DIMS = {2: ("row", "column"), 3: ("channel", "row", "column")}
SAMPLE_DIMS = ("chain", "draw")
COMPRESSION = {"zlib": True, "complevel": 1, "shuffle": True}


def event_dims(name: str, shape: Sequence[int], *, data: bool = False) -> list[str]:
    """The names of the axes of one value of a site, of ``data`` as of an image where they may be one.

    >>> event_dims("x", (1, 28, 28), data=True), event_dims("z", (20,)), event_dims("z", ()), event_dims("w", (2, 3))
    (['channel', 'row', 'column'], ['z_dim'], [], ['w_dim_0', 'w_dim_1'])
    """
    if data and len(shape) in IMAGE_DIMS:
        return list(IMAGE_DIMS[len(shape)])
    return [f"{name}_dim"] if len(shape) == 1 else [f"{name}_dim_{i}" for i in range(len(shape))]


def require_names(traces: Traces) -> None:
    """:class:`UserError` where a latent has a name that a variable of a tree cannot have."""
    for name in latent_sites(traces.model):
        if not _can_stand(name):
            why = "a '/' parts groups" if "/" in name else "it is the name of an axis"
            raise UserError(f"the latent {name!r} cannot stand in a DataTree, where {why}: rename the site")


def data_name(traces: Traces) -> str:
    """What the data are called in a tree: as the site that observes them; x of several, or where no variable can be called so."""
    names = observations(traces.model)
    return names[0] if _can_stand(names[0]) and len(names) == 1 else OBSERVED


def _can_stand(name: str) -> bool:
    return "/" not in name and name not in (*SAMPLE_DIMS, "image")


class Tree:
    """Groups of variables, gathered one after the other.

    Args:
        image: the coordinate of the axis ``image``, ``(N,)``.
    """

    def __init__(self, image: np.ndarray) -> None:
        self.image = image
        self._groups: dict[str, xr.Dataset] = {}

    def add(
        self,
        group: str,
        variables: Mapping[str, np.ndarray],
        dims: Mapping[str, Sequence[str]],
        draw: np.ndarray | None = None,
    ) -> None:
        """A group.

        Args:
            group: its name in ArviZ's schema.
            variables: arrays by name, ``(chain, draw, ...)`` but in groups of data.
            dims: the names of the axes behind those, by variable.
            draw: the coordinate of ``draw``, where not all draws are there.
        """
        coords: dict[str, Any] = {"image": self.image} if any("image" in d for d in dims.values()) else {}
        if draw is not None:
            coords["draw"] = draw
        for name, array in variables.items():
            axes = [*([] if "data" in group else SAMPLE_DIMS), *dims[name]]
            coords |= {d: np.arange(n) for d, n in zip(axes, array.shape, strict=True) if d not in coords}
        named = {n: list(d) for n, d in dims.items()}
        # ArviZ's conventions, on which it warns, are about axes without names: few draws of many chains are meant so
        tree = from_dict({group: dict(variables)}, coords=coords, dims=named, index_origin=0, check_conventions=False)
        self._groups[group] = tree[group].to_dataset()

    def add_per_image(self, group: str, variables: Mapping[str, np.ndarray]) -> None:
        """Variables ``(N,)`` of a group that is there already, with no axis but ``image``."""
        found = self._groups[group]
        self._groups[group] = found.assign({name: ("image", array) for name, array in variables.items()})

    def build(self, attributes: Mapping[str, Any]) -> xr.DataTree:
        """The tree; the attributes stand at its root and, but for versions, at every group of draws."""
        attributes = {name: value for name, value in attributes.items() if value is not None}
        short = {n: v for n, v in attributes.items() if not n.endswith("_version")}
        groups = {n: d if "data" in n else d.assign_attrs(short) for n, d in self._groups.items()}
        tree = xr.DataTree.from_dict(groups)
        tree.attrs = dict(attributes)
        return tree


def save_netcdf(tree: xr.DataTree, path: str | os.PathLike[str]) -> Path:
    """Write a tree as NetCDF, compressed: the whole file or nothing.

    Args:
        tree: what :func:`pyro_vae.posterior` returned.
        path: a name that ends in ``.nc``; ``xarray.open_datatree`` reads it.

    Raises:
        UserError: a name or a place that cannot be written to.
    """
    path = destination(path)
    encoding = {
        node.path: {
            str(name): COMPRESSION
            for name, variable in node.to_dataset(inherit=False).data_vars.items()
            if variable.ndim
        }
        for node in tree.subtree
    }
    with replacing(path) as temporary:
        tree.to_netcdf(temporary, engine="h5netcdf", encoding={k: v for k, v in encoding.items() if v})
    return path


def destination(path: str | os.PathLike[str]) -> Path:
    """``path`` if a NetCDF file can be written there; else a :class:`UserError`, before any work is done."""
    return writable(path, ".nc", "posteriors are written as NetCDF")
