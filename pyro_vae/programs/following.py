"""What is made of some tensors: what torch's operations make of them, or write them into, and whether the host has read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae.programs.trace import Traced, is_factor, is_random, site_log_prob

TO_HOST = (Tensor.numpy, Tensor.tolist, Tensor.__array__)


class Following(TorchDispatchMode):
    """While entered, follows from tensor to tensor whatever is made of those that it was told of; views are one tensor.

    Values do not count: what is multiplied by 0, or compared with a limit that no value is near, is followed all the same.

    Attributes:
        left: whether a number that was made of them went to the host, where nothing is followed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left = False
        self._host = _ToHost(self)
        self._reached: dict[int, Any] = {}  # storages, kept so that no other one has their place

    def start(self, tensor: Tensor) -> None:
        """Follow what is made of this one."""
        storage = tensor.untyped_storage()
        self._reached[storage._cdata] = storage

    def reaches(self, tensor: Tensor) -> bool:
        """Whether it is made of one that is followed."""
        return tensor.untyped_storage()._cdata in self._reached

    def __enter__(self) -> Following:
        super().__enter__()
        self._host.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._host.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = list(_tensors((args, kwargs or {})))
        if any(self.reaches(tensor) for tensor in given):
            made = list(_tensors(out))
            self.left |= not made and out is not None
            for tensor in made if made or out is not None else given:  # what returns nothing writes
                self.start(tensor)
        return out


class _ToHost(TorchFunctionMode):
    """Sees what no operation of tensors is: NumPy's arrays, and lists."""

    def __init__(self, following: Following) -> None:
        super().__init__()
        self.following = following

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.following.left |= func in TO_HOST and self.following.reaches(args[0])
        return func(*args, **(kwargs or {}))


class From(Messenger):
    """Follow the values of the sites whose names are ``chosen``, from where they are drawn; a messenger of Pyro."""

    def __init__(self, following: Following, chosen: Callable[[str], bool]) -> None:
        super().__init__()
        self.following, self.chosen = following, chosen

    def _pyro_post_sample(self, msg: Any) -> None:
        if self.chosen(msg["name"]):
            msg["value"] = msg["value"].clone()  # of a storage of its own
            self.following.start(msg["value"])


def densities_reached(following: Following, traced: Traced, chosen: Callable[[str], bool]) -> list[str]:
    """The sites whose density is made of what is followed, whatever their values are; the ``chosen`` have values drawn anew.

    To be called outside of ``following``, which has seen the run.
    """
    found = []
    for name, site in traced.nodes.items():
        if not is_random(site) or is_factor(site):
            continue
        fn = site.get("whole", site["fn"])
        value = fn.sample() if chosen(name) else site["value"].clone()
        with following:
            density = site_log_prob({**site, "fn": fn, "mask": None}, value)
        if following.reaches(density):
            found.append(str(name))
    return found


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, dict):
        yield from _tensors(tuple(nested.values()))
    elif isinstance(nested, list | tuple):
        for one in nested:
            yield from _tensors(one)
