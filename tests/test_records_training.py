"""Training on records: losses, labels that weigh, runs that are saved and resumed, and what is refused before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from record_programs import M2, JointGaussian, gaussian_data, m2_data
from torch.utils.data import Dataset

import pyro_vae as pv
from pyro_vae.objectives.elbo import ELBO
from pyro_vae.programs.columns import packed
from pyro_vae.programs.contract import admit


class Items(Dataset[Any]):
    """A record as items that are dicts."""

    def __init__(self, record: pv.Record) -> None:
        self.record = record

    def __len__(self) -> int:
        return len(self.record)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: self.record[name][row] for name in self.record}


def test_fit_saves_loads_and_resumes_to_the_bit(tmp_path: Path) -> None:
    """Six epochs are three and three more; the loss falls; the weights come back by the program's own names."""
    record = m2_data(64)
    how: dict[str, Any] = {"batch_size": 16, "lr": 0.05, "objective": "elbo:label_weight=1.0"}
    whole = pv.fit(M2(), record, epochs=6, out=tmp_path / "whole", **how)
    assert whole.metrics[-1]["train_loss"] < whole.metrics[0]["train_loss"]

    stop = lambda metrics: metrics["epoch"] == 3  # noqa: E731
    pv.fit(M2(), record, epochs=6, out=tmp_path / "parts", callback=stop, **how)
    again = pv.fit(M2(), record, epochs=6, out=tmp_path / "parts", resume=True, **how)
    for name, tensor in whole.program.state_dict().items():
        assert torch.equal(tensor, again.program.state_dict()[name]), name
    loaded = pv.load(tmp_path / "whole", program=M2(seed=9))
    a, b = (pv.log_likelihood(p, record[:8], num_samples=50) for p in (whole.program, loaded.program))
    assert torch.equal(a.log_likelihood, b.log_likelihood)


def test_a_dataset_of_dicts_and_a_file_are_records(tmp_path: Path) -> None:
    """The same training from a dict, a Dataset of dicts and an ``.npz``, to the bit."""
    record = m2_data(32)
    columns = {"image": record["image"], "label": record["label"]}
    path = tmp_path / "columns.npz"
    np.savez(path, label_present=record.present["label"].numpy(), **{n: c.numpy() for n, c in columns.items()})
    read = pv.Record.read(path)
    assert torch.equal(read.present["label"], record.present["label"])
    assert torch.equal(read["image"], record["image"])
    full = pv.Record(columns)
    runs = [pv.fit(M2(), data, epochs=1, batch_size=16) for data in (full, columns, Items(full))]
    states = [list(run.program.state_dict().values()) for run in runs]
    for other in states[1:]:
        assert all(torch.equal(x, y) for x, y in zip(states[0], other, strict=True))


def test_labels_weigh() -> None:
    """The surrogate has -alpha log q(label | image) of labelled rows more with a label weight; the loss is the same."""
    program, record = M2(), m2_data(8)
    x = packed(program, record)
    admit(program, x)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss, plain = ELBO()(program, x)
        torch.manual_seed(0)
        weighed_loss, weighed = ELBO(label_weight=3.0)(program, x)
    log_q = (record["image"] @ program.classifier).log_softmax(1).gather(1, record["label"][:, None])[:, 0]
    assert torch.equal(loss, weighed_loss)
    expected = -3.0 * (log_q * record.present["label"]).sum() / 8
    assert float((weighed - plain - expected).detach().abs()) < 1e-9


def test_the_score_function_leaves_given_values_alone() -> None:
    """Of too many states to be summed over, the mean gradient of many draws is that of the sum."""
    program, record = M2(), m2_data(4)
    x = packed(program, record)
    admit(program, x)
    (layout,) = vars(program)["_pyro_vae_layouts"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, summed = ELBO(num_particles=4000)(program, x)
        states, layout.states = layout.states, None
        _, drawn = ELBO(num_particles=40_000)(program, x)
        layout.states = states
    for ours, theirs in zip(
        *(torch.autograd.grad(s, [program.classifier, program.prior]) for s in (summed, drawn)), strict=True
    ):
        assert float((ours - theirs).abs().max()) < 0.06


def test_objectives_that_are_not_made_for_records_are_refused() -> None:
    """By name, before training; an analytic KL beside discrete columns likewise."""
    with pytest.raises(pv.UserError, match="not made for records"):
        pv.fit(M2(), m2_data(16), epochs=1, objective="free-bits")
    with pytest.raises(pv.UserError, match="analytic-elbo does not sum"):
        pv.fit(M2(), m2_data(16), epochs=1, objective="analytic-elbo")
    record, _, _ = gaussian_data(JointGaussian(), 32)
    for objective in ("elbo", "analytic-elbo", "iwae", "wake-sleep"):
        run = pv.fit(JointGaussian(draws=True), record, steps=2, batch_size=16, objective=objective)
        assert len(run.metrics) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Pareto k")  # of a guide that was not trained
def test_minibatches_of_mixed_presence_compile_as_one_graph() -> None:
    """Compiled training, and compiled weights, are the eager ones up to rounding."""
    record = m2_data(64, style=True)
    states = []
    for how in ("on", "off"):
        run = pv.fit(M2(True), record, epochs=2, batch_size=16, compile=how, objective="elbo:label_weight=1.0")
        weights = pv.log_likelihood(M2(True), record, num_samples=100, compile=how).log_likelihood
        states.append({**run.program.state_dict(), "log p": weights})
    for name, tensor in states[0].items():
        assert torch.allclose(tensor, states[1][name], atol=1e-8), name
