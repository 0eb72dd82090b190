"""log p(x_A | x_B) of draws that both terms share: its error, and what must hold of classes."""

from __future__ import annotations

import pytest
import torch
from record_programs import M2, JointGaussian, gaussian_data, m2_data
from test_records import require_standard
from test_records_hostile import Folded

import pyro_vae as pv
from pyro_vae import Record
from pyro_vae.evaluation.subsets import ConditionalLogLikelihood

pytestmark = pytest.mark.filterwarnings("ignore:Pareto k")  # of guides that were not trained


@pytest.mark.slow
@pytest.mark.parametrize("draws", [False, True])
def test_errors_of_shared_draws_are_right(draws: bool) -> None:
    """Of 300 rows with holes, z-scores against the closed form are standard, and 95 % intervals hold it in 91 % or more.

    With 300 rows and a true share of 95 %, fewer than 91 % come about once in 500. The error is smaller than that of separate
    draws where A is one of six numbers, and larger where it is five.
    """
    program = JointGaussian(draws=draws)
    record, values, known = gaussian_data(program, 300)
    for of, given, columns in ((("c",), ("a", "b"), [0, 1, 2, 3, 4]), (("a", "b"), ("c",), [5])):
        some = torch.zeros_like(known)
        some[:, columns] = known[:, columns]
        truth = program.log_prob(values, known) - program.log_prob(values, some)
        found = pv.log_likelihood(program, record, of=of, given=given, num_samples=300, seed=2, common=True)
        assert isinstance(found, ConditionalLogLikelihood)
        assert found.error == "delta"
        there = found.mc_se > 0
        require_standard(((found.log_likelihood - found.bias - truth) / found.mc_se)[there])
        low, high = found.interval[there].unbind(1)
        assert float(((low <= truth[there]) & (truth[there] <= high)).double().mean()) > 0.91
        apart = pv.log_likelihood(program, record, of=of, given=given, num_samples=300, seed=2)
        assert (found.nll_mc_se < apart.nll_mc_se) == (len(of) == 1)


def test_probabilities_of_classes_add_up_to_one() -> None:
    """log p(label | image, style) of M2 for every label, and each within its error of separate draws."""
    program, record = M2(True), m2_data(6, True)
    total = torch.zeros(6, dtype=torch.float64)
    for label in range(3):
        columns = {"image": record["image"], "style": record["style"], "label": torch.full((6,), label)}
        some = Record(columns, {"style": record.present["style"]})
        found, apart = (
            pv.log_likelihood(program, some, of="label", given=("image", "style"), num_samples=1500, common=common)
            for common in (True, False)
        )
        off = (found.log_likelihood - found.bias - apart.log_likelihood + apart.bias) / found.mc_se.hypot(apart.mc_se)
        assert float(off.abs().max()) < 4.0  # of 18: once in 900
        total += found.log_likelihood.exp()
    assert torch.allclose(total, torch.ones_like(total), atol=1e-9)


def test_what_shared_draws_cannot_do_is_refused() -> None:
    """Without anything given, with options of separate draws, of tensors, and of elements that the guide draws."""
    program = JointGaussian(draws=True)
    record, _, _ = gaussian_data(program, 8)
    with pytest.raises(pv.UserError, match="name the columns B"):
        pv.log_likelihood(program, record, of="a", common=True)
    with pytest.raises(pv.UserError, match="take num_samples"):
        pv.log_likelihood(program, record, of="a", given="b", common=True, noise="sobol")
    with pytest.raises(pv.UserError, match="name the columns, of= and given="):
        pv.log_likelihood(program, record, common=True)
    with pytest.raises(pv.UserError, match="draws elements of 'b'"):
        pv.log_likelihood(Folded(), record, of="b", given="a", num_samples=30, common=True)
