"""A user's own folder of images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_vae.data.arrays import levels_up_to
from pyro_vae.data.named import SPLIT_WORDS
from pyro_vae.data.splits import Filed
from pyro_vae.errors import UserError

MODES = ("L", "RGB", "1")


def load(folder: Path) -> Filed:
    """The images of a folder; those of its sub-folders ``train`` and ``test`` (and ``val``), where it has them, are its splits.

    Raises:
        UserError: of :func:`read`; splits whose images or classes differ; one split without the others.
    """
    entries = _visible(folder)
    named = {SPLIT_WORDS[e.name.lower()]: e for e in entries if e.is_dir() and e.name.lower() in SPLIT_WORDS}
    if not entries or len(named) < len(entries):
        return read(folder)
    if not {"train", "test"} <= set(named):
        raise UserError(
            f"the sub-folders of {str(folder)!r} are named like splits ({', '.join(e.name for e in entries)}), and would be "
            "read as classes: expected train and test, or one folder of images"
        )
    parts = [read(named[split]) for split in ("train", "validation", "test") if split in named]
    first = parts[0]
    for part in parts[1:]:
        if part.x.shape[1:] != first.x.shape[1:] or part.label_names != first.label_names:
            raise UserError(
                f"the splits of {str(folder)!r} differ: {tuple(first.x.shape[1:])} of the classes {first.label_names} and "
                f"{tuple(part.x.shape[1:])} of {part.label_names}; bring all to one size, mode and set of classes"
            )
    test, labels = parts[-1], [part.labels for part in parts[:-1] if part.labels is not None]
    levels = max(part.levels or 0 for part in parts)
    return replace(
        first,
        name=folder.resolve().name,
        x=torch.cat([torch.as_tensor(part.x[:]) for part in parts[:-1]]),
        levels=levels,
        test=test.x,
        labels=torch.cat(labels) if labels else None,
        test_labels=test.labels,
        validation=len(parts[1].x) if len(parts) == 3 else None,
        binarization="static" if levels == 2 else "none",
        row_names=None,
    )


def read(folder: Path) -> Filed:
    """Images of one size and mode as uint8 ``(N, C, H, W)``, C = 1 (modes L and 1) or 3 (RGB), sorted by path.

    Pixels that are all 0 or 1, as in images of one bit, are two levels. A photograph with an EXIF orientation is turned upright.
    Where the images lie in sub-folders, one level deep, these are the classes, in alphabetical order. Hidden files
    and folders are passed over; any other file must be an image that Pillow can read.

    Raises:
        UserError: no image, a file that is none, an image of several frames, of another mode, of 16 bits or with
            transparency, or images that differ in size or mode.
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
            size, mode = new_size, new_mode
            images = np.empty((len(paths), *pixels.shape), dtype=np.uint8)
        elif (new_size, new_mode) != (size, mode):
            raise UserError(
                f"the images differ: {_name(first, folder)} is {size[0]} x {size[1]} {mode} and "
                f"{_name(path, folder)} is {new_size[0]} x {new_size[1]} {new_mode}; bring all to one size and mode"
            )
        images[i] = pixels
    name = folder.resolve().name
    levels = levels_up_to(name, int(images.max()))
    return Filed(
        name=name,
        x=torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))),
        levels=levels,
        labels=torch.tensor([classes.index(path.parent.name) for path in paths]) if classes else None,
        binarization="static" if levels == 2 else "none",
        label_names=tuple(classes) or None,
        row_names=tuple(path.relative_to(folder).as_posix() for path in paths),
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
    from PIL import Image, ImageOps

    if not path.is_file():  # a pipe would keep us waiting for ever
        raise UserError(
            f"{_name(path, folder)} in {str(folder)!r} is no ordinary file: expected images only; move it elsewhere"
        )
    try:
        with Image.open(path) as image:
            _require_plain(image, path, folder)
            upright = ImageOps.exif_transpose(image)
            size, mode = upright.size, upright.mode
            pixels: Any = np.asarray(upright)
    except UserError:
        raise
    except Exception as error:  # Pillow's readers fail in as many ways as there are formats
        why = str(error) if not isinstance(error, Image.UnidentifiedImageError) else "no known image format"
        raise UserError(
            f"{_name(path, folder)} in {str(folder)!r} is not an image that can be read ({why[:120]}): "
            "expected images only; move the file elsewhere"
        ) from error
    return pixels.reshape(size[1], size[0], -1), size, mode


def _require_plain(image: Any, path: Path, folder: Path) -> None:
    """:class:`UserError` for an image of which only a part would be read: a frame, a half of its bits, what it looks like."""
    frames = getattr(image, "n_frames", 1)
    depths = [str(part) for tile in image.tile for part in tile if isinstance(part, str)]
    if frames > 1 and image.format != "MPO":  # a photograph with its preview
        what, remedy = f"{frames} frames", "save every frame as an image of its own"
    elif image.mode not in MODES:
        what, remedy = f"mode {image.mode}", "expected L (grey), RGB or 1 (one bit); convert the images to one of them"
    elif any(";16" in depth for depth in depths):
        what, remedy = "16 bits per channel", "expected 8; convert the images, or save them as a float32 array"
    elif "transparency" in image.info:
        what, remedy = "a transparent colour", "put the images on a background of one colour"
    else:
        return
    raise UserError(f"{_name(path, folder)} has {what}: {remedy}")


def _name(path: Path, folder: Path) -> str:
    return repr(path.relative_to(folder).as_posix())
