"""A user's own folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_vae.data.splits import Filed
from pyro_vae.errors import UserError

MODES = {"L": 1, "RGB": 3}


def load(folder: Path) -> Filed:
    """Images of one size and mode as uint8 ``(N, C, H, W)``, C = 1 (mode L) or 3 (RGB), sorted by path.

    Where the images lie in sub-folders, one level deep, these are the classes, in alphabetical order. Hidden files
    and folders are passed over; any other file must be an image that Pillow can read.

    Raises:
        UserError: no image, a file that is none, or images that differ in size or mode.
    """
    paths, classes = _list(folder)
    if len(paths) < 3:
        raise UserError(
            f"the folder {str(folder)!r} holds {len(paths)} images: expected at least 3, one for each split; add some"
        )
    first, size, mode = paths[0], (0, 0), ""
    images = np.empty(0, dtype=np.uint8)
    for i, path in enumerate(paths):
        pixels, new_size, new_mode = _read(path, folder)
        if i == 0:
            if new_mode not in MODES:
                raise UserError(
                    f"{_name(path, folder)} has mode {new_mode}: expected L (grey) or RGB; "
                    "convert the images to one of them"
                )
            size, mode = new_size, new_mode
            images = np.empty((len(paths), *pixels.shape), dtype=np.uint8)
        elif (new_size, new_mode) != (size, mode):
            raise UserError(
                f"the images differ: {_name(first, folder)} is {size[0]} x {size[1]} {mode} and "
                f"{_name(path, folder)} is {new_size[0]} x {new_size[1]} {new_mode}; bring all to one size and mode"
            )
        images[i] = pixels
    return Filed(
        name=folder.resolve().name,
        x=torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))),
        levels=256,
        labels=torch.tensor([classes.index(path.parent.name) for path in paths]) if classes else None,
        label_names=tuple(classes) or None,
    )


def _list(folder: Path) -> tuple[list[Path], list[str]]:
    """Every file in order, and the classes: names of sub-folders, none where the files lie in the folder itself."""
    entries = _visible(folder)
    subfolders = [entry for entry in entries if entry.is_dir()]
    files = [entry for entry in entries if not entry.is_dir()]
    if subfolders and files:
        raise UserError(
            f"{str(folder)!r} has the file {files[0].name!r} beside the sub-folder {subfolders[0].name!r}: "
            "expected images in the folder itself or in one sub-folder per class; move them"
        )
    for subfolder in subfolders:
        inside = _visible(subfolder)
        deeper = next((entry for entry in inside if entry.is_dir()), None)
        if deeper is not None:
            raise UserError(
                f"{_name(deeper, folder)} is a folder two levels down: expected images in one sub-folder per class; "
                "move its images up"
            )
        if not inside:
            raise UserError(f"the sub-folder {_name(subfolder, folder)} holds no image: fill it or remove it")
        files.extend(inside)
    if not files:
        raise UserError(f"the folder {str(folder)!r} holds no image: give a folder of PNG or JPEG files")
    return files, [subfolder.name for subfolder in subfolders]


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot list the folder {str(folder)!r}: {error.strerror}; check its permissions") from error


def _read(path: Path, folder: Path) -> tuple[np.ndarray, tuple[int, int], str]:
    """Pixels (H, W, C), and width x height and mode as Pillow names them."""
    from PIL import Image

    if not path.is_file():  # a pipe would keep us waiting for ever
        raise UserError(
            f"{_name(path, folder)} in {str(folder)!r} is no ordinary file: expected images only; move it elsewhere"
        )
    try:
        with Image.open(path) as image:
            size, mode = image.size, image.mode
            pixels: Any = np.asarray(image)
    except Exception as error:  # Pillow's readers fail in as many ways as there are formats
        why = str(error) if not isinstance(error, Image.UnidentifiedImageError) else "no known image format"
        raise UserError(
            f"{_name(path, folder)} in {str(folder)!r} is not an image that can be read ({why[:120]}): "
            "expected images only; move the file elsewhere"
        ) from error
    return pixels.reshape(size[1], size[0], -1), size, mode


def _name(path: Path, folder: Path) -> str:
    return repr(path.relative_to(folder).as_posix())
