"""Published programs for documents, for sequences, and for records of several columns."""

from __future__ import annotations

from types import ModuleType

import torch
from published_source import ROWS, Case, Checkout, binary, counts, published, real
from torch import nn

MASTERS = "czeslaw-milosz/masters-mimuw"
WORDS = 12


def _masters(at: Checkout) -> ModuleType:
    return at.package("models.full_models", "src")


@published("masters/prodlda", MASTERS, "src/models/full_models.py", objective="TraceMeanField_ELBO", observed="docs")
def _(at: Checkout) -> Case:
    return Case(_masters(at).ProdLDA(WORDS, 3, 8, 0.2), counts(WORDS))


@published("masters/prodlda-penalised", MASTERS, "src/models/full_models.py", kind="globals", observed="docs")
def _(at: Checkout) -> Case:
    # A penalty on the weights is a factor of the guide, with no axis of rows.
    return Case(_masters(at).ProdLDA(WORDS, 3, 8, 0.2, loss_regularizer="l2", reg_lambda=1.0), counts(WORDS))


@published("masters/dirichlet-vae", MASTERS, "src/models/full_models.py", objective="TraceMeanField_ELBO")
def _(at: Checkout) -> Case:
    return Case(_masters(at).DVAE(WORDS, 3, 0.1, 8, 8, 0.2, cuda=False), counts(WORDS))


@published("ucals/cvae", "ucals/cvae", "src/cvae.py", kind="parts-observed", observed="ys")
def _(at: Checkout) -> Case:
    program = at.definitions().CVAE(3, 8, 8, nn.Sequential(nn.Flatten(), nn.Linear(784, 784), nn.Sigmoid()))
    ys = binary(28, 28)
    xs = ys.clone()
    xs[:, 14:, :14] = -1
    return Case(program, ys, inputs={"xs": xs})


@published("kim-hyunsu/cevae", "kim-hyunsu/CEVAE-pyro", "model/vae.py", kind="parts-observed", positional=("data",),
           observed="data")  # fmt: skip
def _(at: Checkout) -> Case:
    # Its argument is the record itself, (x, t, y), and each column is observed at its own site, x at two.
    program = at.package("model.vae").VAE(3, 4, 2, 8, 2, torch.nn.functional.elu, False)
    return Case(program.double(), (torch.cat([real(4), binary(3)], -1).double(), binary().double(), real().double()))


@published("messiest/dmm", "messiest/deep-markov-model", "dmm.py", kind="variable-length", observed="mini_batch")
def _(at: Checkout) -> Case:
    import pyro.contrib.examples.polyphonic_data_loader as poly

    program = at.definitions(poly=poly).DMM(input_dim=6, z_dim=3, emission_dim=5, transition_dim=5, rnn_dim=7)
    x, lengths = binary(5, 6), (torch.arange(ROWS) % 5 + 1).sort(descending=True).values
    backwards = poly.reverse_sequences(x, lengths)
    inputs = {
        "mini_batch_reversed": nn.utils.rnn.pack_padded_sequence(backwards, lengths, batch_first=True),
        "mini_batch_mask": poly.get_mini_batch_mask(x, lengths),
        "mini_batch_seq_lengths": lengths,
    }
    return Case(program, x, inputs=inputs)


@published("tanaka/change-point", "tanaka-hiroki1989/dev_python_dmm_pyro", "change_point_dmm.py",
           kind="coupled-rows", observed="data")  # fmt: skip
def _(at: Checkout) -> Case:
    # The rows are the steps of one sequence.
    program = at.definitions().change_point_DMM(10)
    return Case((program.model1, program.guide1), real(1, 3, rows=10))
