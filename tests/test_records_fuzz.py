"""Records of any kind, and files of columns that strangers wrote: the right number, or an error of one line."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from record_programs import SIZES, JointGaussian, gaussian_data

import pyro_vae as pv
from pyro_vae import Record, UserError, registry
from pyro_vae.programs.columns import packed
from pyro_vae.programs.contract import admit
from pyro_vae.seeding import seeded

# guides that were not trained
pytestmark = pytest.mark.filterwarnings("ignore:Pareto k", "ignore:K =", "ignore:of the")

SMALL: dict[str, Any] = {"encoder": "mlp:hidden=[8]", "decoder": "mlp:hidden=[8]", "latent_dim": 3}
PROGRAMS = ("conditional", "semi-supervised")


def masks(random: np.random.Generator, rows: int, size: int) -> torch.Tensor | None:
    """What of a column is present: all, none, some rows, some elements, one element."""
    kind = random.integers(5)
    if kind == 0:
        return None
    if kind == 1:
        return torch.zeros(rows, dtype=torch.bool)
    if kind == 2:
        return torch.from_numpy(random.random(rows) < random.random())
    found = torch.from_numpy(random.random((rows, size)) < random.random())
    if kind == 3:
        found[:] = False
        found[random.integers(rows), random.integers(size)] = True
    return found


@pytest.mark.parametrize("number", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_any_pattern_of_holes_has_its_closed_form(number: int) -> None:
    """Any mask of any column, in any order, in either precision: log p of what is present, and of parts given others.

    The largest of some 20 x 60 z-scores at a time: beyond 5 once in 1,500 cases.
    """
    random = np.random.default_rng(11)
    for case in range(number):
        program = JointGaussian(draws=bool(random.integers(2)), wide=1.1)
        _, values, _ = gaussian_data(program, 20, seed=case)
        known, columns, present, at = torch.ones(20, 6, dtype=torch.bool), {}, {}, 0
        for name, size in SIZES.items():
            columns[name] = values[:, at : at + size]
            mask = masks(random, 20, size)
            if mask is not None:
                present[name] = mask
                known[:, at : at + size] = mask.reshape(20, -1)
                columns[name] = torch.where(mask.reshape(20, -1), columns[name], torch.nan)
            at += size
        order = random.permutation(list(columns)).tolist()
        record = Record({name: columns[name] for name in order}, present)
        found = pv.log_likelihood(program, record, num_samples=200, seed=case)
        off = found.log_likelihood - found.bias - program.log_prob(values, known)
        assert float((off.abs() / found.mc_se.clamp(min=1e-7)).max()) < 5, (case, record)
        of, given = order[:1], order[1:]
        some, at = known.clone(), 0
        for name, size in SIZES.items():
            some[:, at : at + size] &= name in given
            at += size
        truth = program.log_prob(values, known) - program.log_prob(values, some)
        common = bool(random.integers(2)) and not (program.draws and "c" in of)
        part = pv.log_likelihood(program, record, of=of, given=given, num_samples=200, seed=case, common=common)
        off = part.log_likelihood - part.bias - truth
        assert float((off.abs() / part.mc_se.clamp(min=1e-7)).max()) < 5, (case, record, of)


@pytest.mark.parametrize("number", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_files_of_columns_are_read_as_they_are_or_refused_in_a_line(tmp_path: Path, number: int) -> None:
    """Arrays of any dtype and shape, masks that fit and that do not, NaN: what comes back is what was written."""
    random, path = np.random.default_rng(5), tmp_path / "a.npz"
    read, refused = 0, list[str]()
    for _ in range(number):
        rows, arrays = int(random.integers(1, 9)), dict[str, np.ndarray]()
        for name in random.permutation(["a", "b", "x", "label", "c_present"])[: random.integers(1, 4)]:
            shape = (
                rows if random.random() < 0.9 else int(random.integers(0, 4)),
                *random.integers(1, 3, random.integers(3)),
            )
            dtype = random.choice(
                ["f4", "f8", "i8", "u1", "?", ">f4", "i2", "c8", "U2", "f2"], p=[0.3, 0.2, 0.2] + [0.3 / 7] * 7
            )
            value = (random.random(shape) * 5).astype(dtype) if dtype != "U2" else np.full(shape, "ab")
            if value.dtype.kind == "f" and value.size and random.random() < 0.3:
                value.flat[0] = random.choice([np.nan, np.inf])
            arrays[str(name)] = value
            if random.random() < 0.6:
                mask = random.random(value.shape if random.random() < 0.5 else value.shape[:1]) < 0.7
                arrays[f"{name}_present"] = mask if random.random() < 0.9 else mask.astype("f4")
        np.savez(path, **arrays)
        try:
            data = pv.load_data(path, present="nan" if random.random() < 0.5 else None)
        except UserError as error:
            refused.append(str(error))
            continue
        if data.columns is None:
            continue
        read += 1
        for split in ("train", "validation", "test"):
            found, index = data.observed(split), data.rows[split]
            assert index is not None
            for name in found:
                value, known = torch.from_numpy(arrays[name].astype("f8")[index.numpy()]), found.present[name]
                wide = known.reshape(known.shape + (1,) * (value.dim() - known.dim())).expand(value.shape)
                assert torch.equal(found[name].double()[wide], value.to(found[name].dtype).double()[wide])
                mask = arrays.get(f"{name}_present")
                if mask is not None:
                    mask = mask[index.numpy()].reshape(mask[index.numpy()].shape + (1,) * (value.dim() - mask.ndim))
                    assert not bool((wide & ~torch.from_numpy(np.broadcast_to(mask, value.shape).copy())).any())
    assert read > number // 10
    assert not any("\n" in line for line in refused)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_take_the_blocks_that_the_vae_takes(name: str) -> None:
    """Priors and posteriors go together as they do elsewhere; a program of them has finite numbers and gradients."""
    from pyro_vae.objectives.elbo import ELBO

    random = torch.Generator().manual_seed(0)
    x = torch.bernoulli(torch.full((9, 1, 4, 4), 0.5), generator=random)
    label, taken, refused = torch.arange(9) % 3, 0, list[str]()
    for prior, posterior in itertools.product(registry.names("priors"), registry.names("posteriors")):
        options: dict[str, Any] = {**SMALL, "prior": prior, "posterior": posterior}
        try:
            pv.build("mlp", "diagonal", (1, 4, 4), **options)
        except UserError:
            with pytest.raises(UserError):
                pv.build(name, "diagonal", (1, 4, 4), program=f"{name}:classes=3", **options)
            continue
        try:
            program: Any = pv.build(name, "diagonal", (1, 4, 4), program=f"{name}:classes=3", **options)
        except UserError as error:  # what is made of the guide has no label to ask it with
            refused.append(str(error))
            continue
        taken += 1
        record = Record({"x": x, "label": label}, {"label": label == 0})
        data = (packed(program, record), None) if name == "semi-supervised" else (x, label)
        admit(program, *data)
        with seeded(0):
            loss, surrogate = ELBO()(program, *data)
        surrogate.backward()
        assert bool(torch.isfinite(loss)), (prior, posterior)
        assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in program.parameters()), (
            prior,
            posterior,
        )
        found = pv.log_likelihood(program, record if name == "semi-supervised" else x, data[1], num_samples=8)
        assert bool(torch.isfinite(found.log_likelihood).all()), (prior, posterior)
    assert taken > 20
    assert all("made of the guide" in line or name in line for line in refused), refused


def test_labels_of_a_declared_program_are_summed_over() -> None:
    """Of `semi-supervised`, log p(x) is the log of the sum of p(x, label); of a label that is given, log p(x, label) is less."""
    x = torch.bernoulli(torch.full((6, 1, 4, 4), 0.5), generator=torch.Generator().manual_seed(0))
    program = pv.build("semi-supervised", "diagonal", (1, 4, 4), program="semi-supervised:classes=3", **SMALL)
    each = [
        pv.log_likelihood(program, Record({"x": x, "label": torch.full((6,), k)}), num_samples=400, seed=k)
        for k in range(3)
    ]
    values = torch.stack([one.log_likelihood - one.bias for one in each])
    share = values.softmax(0)
    whole = pv.log_likelihood(program, x, num_samples=400, seed=9)
    error = (share * torch.stack([one.mc_se for one in each])).square().sum(0).sqrt().hypot(whole.mc_se)
    off = values.logsumexp(0) - whole.log_likelihood + whole.bias
    assert float((off / error).abs().max()) < 4.5
    joint = pv.log_likelihood(
        program, Record({"x": x, "label": torch.zeros(6)}, {"label": torch.zeros(6) > 0}), num_samples=400
    )
    off = joint.log_likelihood - joint.bias - values.logsumexp(0)
    assert float((off / error.hypot(joint.mc_se)).abs().max()) < 4.5
