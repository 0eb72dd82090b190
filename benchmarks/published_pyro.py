"""Pyro's own examples and tutorials with an amortised guide, and its contributed models.

All of them, but for what repeats a program in prose (the notebooks on cvae, dmm and ss-vae) and csis.ipynb, whose guide is
trained by CSIS on draws from the model and not by an ELBO. The contributed ones are those of the Pyro that is installed.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial

import torch
from published_source import Case, Checkout, binary, counts, grey, one_hot, published, real
from pyro.infer import config_enumerate
from torch import nn

PYRO = "pyro-ppl/pyro"
MNIST = (1, 28, 28)


@published("pyro/vae", PYRO, "examples/vae/vae.py")
def _(at: Checkout) -> Case:
    return Case(at.definitions().VAE(z_dim=3, hidden_dim=8), binary(*MNIST))


@published("pyro/tutorial-vae", PYRO, "tutorial/source/vae.ipynb")
def _(at: Checkout) -> Case:
    return Case(at.definitions().VAE(z_dim=3, hidden_dim=8), binary(*MNIST))


@published("pyro/vae-comparison", PYRO, "examples/vae/vae_comparison.py", observed="data")
def _(at: Checkout) -> Case:
    module = at.definitions("TRAIN", "TEST")
    return Case(module.PyroVAEImpl(Namespace(jit=False), None, None), binary(*MNIST))


@published("pyro/vae-flow-prior", PYRO, "tutorial/source/vae_flow_prior.ipynb")
def _(at: Checkout) -> Case:
    return Case(at.definitions().VAE(12, 4), binary(12))


@published("pyro/flow-guide", PYRO, "tutorial/source/svi_flow_guide.ipynb")
def _(at: Checkout) -> Case:
    # The notebook's rows lie on axis 1, (5, N, 2).
    module = at.definitions("prior", "flow")
    module.flow.transform = module.flow.transform.inv
    return Case((lambda x: module.model(x.transpose(0, 1)), lambda x: module.guide(x.transpose(0, 1))), real(5, 2))


@published("pyro/prodlda", PYRO, "tutorial/source/prodlda.ipynb", objective="TraceMeanField_ELBO", observed="docs")
def _(at: Checkout) -> Case:
    return Case(at.definitions().ProdLDA(vocab_size=12, num_topics=3, hidden=8, dropout=0.2), counts(12))


def _ss_vae(at: Checkout, enumerated: bool) -> nn.Module:
    return at.definitions().SSVAE(
        output_size=4, input_size=12, z_dim=3, hidden_layers=[8], config_enum="parallel" if enumerated else None
    )


@published("pyro/ss-vae-unlabelled", PYRO, "examples/vae/ss_vae_M2.py", observed="xs")
def _(at: Checkout) -> Case:
    return Case(_ss_vae(at, enumerated=False), binary(12))


@published("pyro/ss-vae-enumerated", PYRO, "examples/vae/ss_vae_M2.py", objective="TraceEnum_ELBO", observed="xs")
def _(at: Checkout) -> Case:
    program = _ss_vae(at, enumerated=True)
    return Case(program, binary(12), guide=config_enumerate(program.guide, "parallel", expand=True))


@published("pyro/ss-vae-labelled", PYRO, "examples/vae/ss_vae_M2.py", observed="xs", labels="ys", conditioned=("y",))
def _(at: Checkout) -> Case:
    return Case(_ss_vae(at, enumerated=False), binary(12), one_hot(4))


def _scanvi(at: Checkout) -> nn.Module:
    return at.definitions().SCANVI(num_genes=12, num_labels=3, l_loc=3.0, l_scale=0.5, latent_dim=3, scale_factor=0.1)


@published("pyro/scanvi-unlabelled", PYRO, "examples/scanvi/scanvi.py", objective="TraceEnum_ELBO")
def _(at: Checkout) -> Case:
    program = _scanvi(at)
    return Case(program, counts(12), guide=config_enumerate(program.guide, "parallel", expand=True))


@published(
    "pyro/scanvi-labelled",
    PYRO,
    "examples/scanvi/scanvi.py",
    objective="TraceEnum_ELBO",
    labels="y",
    conditioned=("y",),
)
def _(at: Checkout) -> Case:
    return Case(_scanvi(at), counts(12), one_hot(3))


@published("pyro/tutorial-scanvi", PYRO, "tutorial/source/scanvi.ipynb", objective="TraceEnum_ELBO")
def _(at: Checkout) -> Case:
    program = _scanvi(at)
    return Case(program, counts(12), guide=config_enumerate(program.guide, "parallel", expand=True))


@published("pyro/air", PYRO, "examples/air/air.py", objective="TraceGraph_ELBO", observed="data")
def _(at: Checkout) -> Case:
    module = at.definitions("expansion_indices", "ModelState", "GuideState")
    program = module.AIR(
        num_steps=2, x_size=10, window_size=6, z_what_size=4, rnn_hidden_size=8, encoder_net=[8], decoder_net=[8]
    )
    return Case(program, grey(10, 10), constants={"batch_size": None})


@published("pyro/tutorial-air", PYRO, "tutorial/source/air.ipynb", objective="TraceGraph_ELBO",
           kind="noise-outside-sites", observed="data")  # fmt: skip
def _(at: Checkout) -> Case:
    # Its guide draws 64 of the rows itself: fewer it cannot take, and of more it leaves some out by chance.
    names = ["decode", "rnn", "encode", "predict", "bl_rnn", "bl_predict", "GuideState"]
    names += ["z_where_prior_loc", "z_where_prior_scale", "z_what_prior_loc", "z_what_prior_scale"]
    module = at.definitions(*names)
    return Case((module.model, module.guide), grey(2500, rows=64))


@published("pyro/cvae", PYRO, "examples/cvae/cvae.py", kind="parts-observed", observed="ys")
def _(at: Checkout) -> Case:
    # The observed site is ys[xs == -1]: a selection of the elements.
    program = at.definitions().CVAE(3, 8, 8, nn.Sequential(nn.Flatten(), nn.Linear(784, 784), nn.Sigmoid()))
    ys = binary(28, 28)
    xs = ys.clone()
    xs[:, 14:, :14] = -1
    return Case(program, ys, inputs={"xs": xs})


def _dmm(at: Checkout, **options: int) -> Case:
    module = at.definitions()
    sizes = {"input_dim": 6, "z_dim": 3, "emission_dim": 5, "transition_dim": 5, "rnn_dim": 7}
    x, lengths = binary(5, 6), torch.arange(24) % 5 + 1
    lengths = lengths.sort(descending=True).values
    mask = module.poly.get_mini_batch_mask(x, lengths)
    inputs = {
        "mini_batch_reversed": module.poly.reverse_sequences(x, lengths),
        "mini_batch_mask": mask,
        "mini_batch_seq_lengths": lengths,
    }
    inputs["mini_batch_reversed"] = nn.utils.rnn.pack_padded_sequence(
        inputs["mini_batch_reversed"], lengths, batch_first=True
    )
    return Case(module.DMM(**sizes, **options), x, inputs=inputs)


@published("pyro/dmm", PYRO, "examples/dmm.py", kind="variable-length", observed="mini_batch")
def _(at: Checkout) -> Case:
    return _dmm(at)


@published("pyro/dmm-iaf", PYRO, "examples/dmm.py", kind="variable-length", observed="mini_batch")
def _(at: Checkout) -> Case:
    return _dmm(at, num_iafs=1, iaf_dim=6)


@published("pyro/lda", PYRO, "examples/lda.py", objective="TraceEnum_ELBO", plates=2, kind="globals", observed="data")
def _(at: Checkout) -> Case:
    module = at.definitions()
    args = Namespace(num_topics=2, num_words=6, num_docs=24, num_words_per_doc=5, layer_sizes="8")
    guide = partial(module.parametrized_guide, module.make_predictor(args))
    return Case((module.model, guide), torch.randint(6, (5, 24)), constants={"args": args, "batch_size": 8})


@published("pyro/cevae", PYRO, "pyro/contrib/cevae/__init__.py", kind="parts-observed")
def _(at: Checkout) -> Case:
    # The record is (x, t, y): three sites observe one column each.
    from pyro.contrib.cevae import CEVAE

    program = CEVAE(feature_dim=5, outcome_dist="bernoulli", latent_dim=3, hidden_dim=8, num_layers=2)
    return Case((program.model, program.guide), real(5), inputs={"t": binary(), "y": binary()})


@published("pyro/factor-mue", PYRO, "pyro/contrib/mue/models.py", kind="globals", observed="seq_data")
def _(at: Checkout) -> Case:
    from pyro.contrib.mue.models import FactorMuE

    program = FactorMuE(data_length=6, alphabet_length=3, z_dim=2, batch_size=24, latent_seq_length=4)
    x = torch.nn.functional.one_hot(torch.randint(3, (24, 6)), 3).float()
    return Case(program, x, constants={"local_scale": 1.0, "local_prior_scale": 1.0})
