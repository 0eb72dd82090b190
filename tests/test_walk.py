"""The one walk over rows and draws, and the one evaluation that takes its method as an argument."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small import digits, small_vae
from torch import Tensor

import pyro_vae as pv
from pyro_vae.errors import UserError
from pyro_vae.evaluation.ais import AnnealedLogLikelihood
from pyro_vae.evaluation.methods import Annealing, ImportanceSampling
from pyro_vae.programs import walk as module
from pyro_vae.programs.walk import AT_ONCE, SmallerChunkWarning, Walk, at_once, spans


def program() -> Any:
    return pv.build("ppca", "linear", (3,), latent_dim=2)


def walked(walk: Walk, limit: int | None = None, share: float = 0.0) -> list[tuple[int, int, int]]:
    """(First row, rows, draws) of the blocks that were computed; more rows times draws than ``limit`` find no memory."""
    for block in walk:
        with block:
            if share:
                block.report(share)
            if limit is not None and len(block) * walk.draws > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            walk.keep((block.first, len(block), walk.draws))
    return walk.gathered()


def test_blocks_hold_every_row_once_on_the_program_s_terms() -> None:
    vae, x, y = program().double().train(), torch.arange(15).reshape(5, 3), torch.arange(5)
    seen: list[tuple[Tensor, Tensor | None]] = []
    for block in Walk(vae, x, y, rows=2):
        with block:
            assert not vae.training
            assert not torch.is_grad_enabled()
            seen.append((block.x, block.y))
    assert vae.training
    assert [len(rows) for rows, _ in seen] == [2, 2, 1]
    assert torch.equal(torch.cat([rows for rows, _ in seen]), x.double())
    assert torch.equal(torch.cat([labels for _, labels in seen if labels is not None]), y)


@pytest.mark.parametrize(("whole", "last"), [(False, (8, 2, 2)), (True, (8, 1, 8))])
def test_memory_that_runs_out_halves_draws_and_then_rows(whole: bool, last: tuple[int, int, int]) -> None:
    """From the block that failed on; what it had reported is taken back, and all adds up to the rows."""
    done: list[float] = []
    walk = Walk(program(), torch.zeros(10, 3), rows=4, draws=8, whole=whole, progress=done.append)
    with pytest.warns(SmallerChunkWarning, match="out of memory with 32 images times samples at once") as caught:
        found = walked(walk, 8, share=0.25)
    assert len(caught) == 1
    assert found[-2 if whole else -1] == last
    assert sum(rows for _, rows, _ in found) == 10
    assert sum(done) == pytest.approx(10)
    assert walk.rows * walk.draws == 8
    again = walked(Walk(program(), torch.zeros(10, 3), rows=walk.rows, draws=walk.draws, whole=whole))
    assert again == found


@pytest.mark.parametrize(("whole", "what"), [(False, "one sample of one image"), (True, "8 chains of one image")])
def test_no_memory_for_one_row_is_an_error(whole: bool, what: str) -> None:
    with pytest.warns(SmallerChunkWarning), pytest.raises(UserError, match=f"out of memory with {what}"):
        walked(Walk(program(), torch.zeros(3, 3), rows=2, draws=8, whole=whole), 0)


def test_an_error_without_words_is_told_by_its_name() -> None:
    with pytest.raises(UserError, match=r"out of memory with one sample of one image \(MemoryError\)"):  # noqa: PT012
        for block in Walk(program(), torch.zeros(1, 3), rows=1):
            with block:
                raise MemoryError


def test_other_errors_end_the_walk() -> None:
    vae = program().train()
    with pytest.raises(RuntimeError, match="a fault"):  # noqa: PT012
        for block in Walk(vae, torch.zeros(4, 3), rows=2):
            with block:
                raise RuntimeError("a fault")
    assert vae.training


def test_work_that_was_done_before_is_not_done_again() -> None:
    done: list[float] = []
    assert walked(Walk(program(), torch.zeros(7, 3), rows=3, begin=3, progress=done.append)) == [(3, 3, 1), (6, 1, 1)]
    assert done == [3, 3, 1]
    assert {type(rows) for rows in done} == {int}


@pytest.mark.parametrize("num_rows", [0, 1, 5, 12, 13])
def test_processes_share_whole_blocks_and_leave_none(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_joined", lambda: True)
    monkeypatch.setattr(module.dist, "get_world_size", lambda: 3)
    found = []
    for rank in range(3):
        monkeypatch.setattr(module.dist, "get_rank", lambda rank=rank: rank)
        walk = Walk(program(), torch.zeros(num_rows, 3), rows=2, shared=True)
        found += [(block.first, len(block)) for block in walk]
    monkeypatch.undo()
    assert found == [(block.first, len(block)) for block in Walk(program(), torch.zeros(num_rows, 3), rows=2)]


def test_the_table_of_sizes() -> None:
    assert min(AT_ONCE.values()) >= 1
    assert at_once("importance weights", 784) == 2**20 // 784
    assert at_once("importance weights", 2**30) == 1
    assert at_once("importance weights", 2**30, least=64) == 64
    assert [s.stop - s.start for s in spans(10, 4)] == [4, 4, 2]
    assert list(spans(0, 4)) == []


def test_rows_and_draws_are_cut_in_one_place() -> None:
    """Beside it, in the data and in a command: where no program is run."""
    root = Path(pv.__file__).parent
    found = {str(f.relative_to(root)) for f in root.rglob("*.py") if "range(0," in f.read_text(encoding="utf-8")}
    beside = {"cli/anomaly.py", "data/preparation.py", "data/arrays.py"}
    assert found - beside == {"programs/walk.py"}


def test_options_of_a_method_are_keywords_of_what_it_does() -> None:
    for function in (pv.annealed_log_likelihood, pv.bidirectional):
        parameters = inspect.signature(function).parameters
        assert {n: parameters[n].default for n in vars(Annealing())} == vars(Annealing())
    for function in (pv.log_likelihood, pv.evaluate):
        parameters = inspect.signature(function).parameters
        assert {n: parameters[n].default for n in vars(ImportanceSampling())} == vars(ImportanceSampling())


def test_evaluate_takes_every_option_by_keyword_or_in_its_method() -> None:
    data = digits()
    vae = small_vae(data)
    options: dict[str, Any] = {"num_samples": 40, "seed": 3, "chunk_size": 100, "compile": "off"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_keyword, one = pv.evaluate(vae, data, limit=6, **options)
        by_method, other = pv.evaluate(vae, data, limit=6, method=ImportanceSampling(**options))
        sobol, _ = pv.evaluate(vae, data, limit=6, method=ImportanceSampling(40, noise="sobol"))
        how = Annealing(num_chains=3, num_distributions=5, num_leapfrog=2, schedule="linear", chunk_size=6)
        annealed, result = pv.evaluate(vae, data, limit=4, method=how, simulated=True)
    assert torch.equal(one.log_likelihood, other.log_likelihood)
    assert {**by_keyword, "seconds": 0} == {**by_method, "seconds": 0}
    assert [by_method["method"], sobol["noise"], annealed["method"]] == ["iw", "sobol", "bdmc"]
    assert isinstance(result, AnnealedLogLikelihood)
    assert (annealed["num_samples"], annealed["num_distributions"], annealed["chunk_size"]) == (3, 5, 6)
    assert annealed["bdmc_num_images"] == 4
    assert set(by_method) - {"method", "proof"} <= set(annealed)  # annealing has no weights of the guide


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": ImportanceSampling(), "num_samples": 3}, "give num_samples to the method, as an option of ImportanceS"),
        ({"simulated": True}, r"are for annealing: give method=Annealing\(...\)"),
        ({"method": "ais"}, r"expected method as ImportanceSampling\(...\) or Annealing\(...\), got str"),
    ],
)  # fmt: skip
def test_evaluate_refuses_options_that_belong_elsewhere(options: dict[str, Any], message: str) -> None:
    data = digits()
    with pytest.raises(UserError, match=message):
        pv.evaluate(small_vae(data), data, limit=3, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImportanceSampling(num_samples=0), "expected num_samples of at least 1, got 0"),
        (lambda: ImportanceSampling(compile="maybe"), "expected compile to be auto, on or off"),
        (lambda: ImportanceSampling(noise="sobol", target_se=0.1), "target_se needs random noise"),
        (lambda: ImportanceSampling(num_samples="5"), "ImportanceSampling: expected num_samples to be a whole number"),  # type: ignore[arg-type]
        (lambda: ImportanceSampling(seed=None), "ImportanceSampling: expected seed to be a whole number"),  # type: ignore[arg-type]
        (lambda: Annealing(num_chains=0), "expected num_chains of at least 1, got 0"),
        (lambda: Annealing(target_accept=True), "Annealing: expected target_accept to be a number, got True"),
    ],
)
def test_a_method_holds_its_options(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
