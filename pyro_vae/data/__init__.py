"""Data sets, binarization, and a user's own arrays and folders of images.

:func:`load_data` gives a :class:`Data` by name or path. :data:`DATA_SETS` lists the names; reading it does not
import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyro_vae.data.names import DATA_SETS

if TYPE_CHECKING:
    from pyro_vae.data.data import Data
    from pyro_vae.data.load import load_data

__all__ = ["DATA_SETS", "Data", "load_data"]


def __getattr__(name: str) -> Any:
    # Torch takes seconds to import, and `pyro-vae list data` needs only the names.
    if name == "Data":
        from pyro_vae.data.data import Data

        return Data
    if name == "load_data":
        from pyro_vae.data.load import load_data

        return load_data
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
