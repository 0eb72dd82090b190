"""Published programs for counts of single cells."""

from __future__ import annotations

from typing import Any

import torch
from published_source import ROWS, Case, Checkout, binary, classes, counts, one_hot, published, real
from pyro.infer import config_enumerate
from torch import Tensor, nn

GENES = 12
SCVI = "scverse/scvi-tools"
DRVISH = "czbiohub/drvish"
POLARBEAR = "ilia-kats/PolarbearPlus"
ENUMERATED = {"objective": "TraceEnum_ELBO", "observed": "xs"}


def _enumerated(program: nn.Module, x: Tensor, **rest: Any) -> Case:
    return Case(program, x, guide=config_enumerate(program.guide, "parallel", expand=True), **rest)


def _decipher(at: Checkout, prior: str) -> nn.Module:
    networks = Checkout(at.root, "decipher/tools/_decipher/module.py").definitions()
    module = at.definitions(ConditionalDenseNN=networks.ConditionalDenseNN)
    sizes = {"dim_z": 3, "dim_v": 2, "layers_v_to_z": (8,), "dim_genes": GENES, "n_cells": ROWS}
    return module.Decipher(module.DecipherConfig(prior=prior, _initialized_from_adata=True, **sizes))


@published("decipher/normal", "azizilab/decipher", "decipher/tools/_decipher/decipher.py")
def _(at: Checkout) -> Case:
    return Case(_decipher(at, "normal"), counts(GENES))


@published("decipher/gamma", "azizilab/decipher", "decipher/tools/_decipher/decipher.py")
def _(at: Checkout) -> Case:
    return Case(_decipher(at, "gamma"), counts(GENES))


@published("scvi/decipher", SCVI, "src/scvi/external/decipher/_module.py")
def _(at: Checkout) -> Case:
    module = at.package("scvi.external.decipher._module", "src")
    return Case(module.DecipherPyroModule(GENES, dim_z=3, layers_v_to_z=(8,)), counts(GENES))


@published("scvi/amortized-lda", SCVI, "src/scvi/module/_amortizedlda.py", kind="globals",
           positional=("x", "library"))  # fmt: skip
def _(at: Checkout) -> Case:
    x = counts(GENES)
    program = at.package("scvi.module", "src").AmortizedLDAPyroModule(GENES, 3, 8)
    return Case(program, x, inputs={"library": x.sum(-1)}, constants={"n_obs": ROWS})


@published("drvish/nbvae", DRVISH, "src/drvish/models/nbvae.py")
def _(at: Checkout) -> Case:
    sizes = {"n_input": GENES, "n_latent": 3, "layers": (8, 8), "lib_loc": 3.0}
    return Case(at.package("drvish.models.nbvae", "src").NBVAE(**sizes), counts(GENES))


@published("polarbear/rna", POLARBEAR, "src/polarbearplus/_vae/rnavae.py",
           objective="TraceMeanField_ELBO", plates=2, observed="expression_mat")  # fmt: skip
def _(at: Checkout) -> Case:
    # Cells on axis -2, genes on axis -1, both plates.
    program = at.definitions()._RNAVAE(GENES, 2, [3.0, 3.2], [0.2, 0.3], 3, 1, 8)
    return Case(program, counts(GENES), inputs={"batch_idx": classes(2)})


@published("polarbear/atac", POLARBEAR, "src/polarbearplus/_vae/atacvae.py",
           objective="TraceMeanField_ELBO", plates=2, observed="region_mat")  # fmt: skip
def _(at: Checkout) -> Case:
    program = at.definitions()._ATACVAE([(0, 5), (5, GENES)], 2, 1.0, 3, 1, 0.1, 1, 0.1)
    return Case(program, binary(GENES), inputs={"batch_idx": classes(2)})


# By default they observe a multinomial of 100,000,000 trials, of which no machine here can draw.
COUNTED = {"loss_func": "negbinomial"}
CLASSIFIER = {"repository": "ZengFLab/scClassifier", "path": "scClassifier.py"}


def _classifier(at: Checkout, **options: Any) -> nn.Module:
    at.package("utils.custom_mlp")
    return at.definitions().scClassifier(3, GENES, 3, [8], config_enum="parallel", **COUNTED, **options)


@published("scclassifier/unlabelled", **CLASSIFIER, **ENUMERATED)
def _(at: Checkout) -> Case:
    return _enumerated(_classifier(at), counts(GENES))


@published("scclassifier/labelled", labels="ys", conditioned=("y",), observed="xs", **CLASSIFIER)
def _(at: Checkout) -> Case:
    return Case(_classifier(at, use_mask=False), counts(GENES), one_hot(3))


@published("scclassifier/zero-inflated", **CLASSIFIER, **ENUMERATED)
def _(at: Checkout) -> Case:
    return _enumerated(_classifier(at, use_zeroinflate=True, delta=0), counts(GENES))


@published("scclassifier/real-labels", observed="xs", **CLASSIFIER)
def _(at: Checkout) -> Case:
    return Case(_classifier(at, label_type="real", dist_model="mm"), counts(GENES))


@published("scclassifier/zeros-observed-too", kind="parts-observed", **CLASSIFIER, **ENUMERATED)
def _(at: Checkout) -> Case:
    # Which counts are not zero is a second observed site, made of the first.
    return _enumerated(_classifier(at, use_zeroinflate=True), counts(GENES))


PHENO = {"repository": "ZengFLab/scPheno", "path": "scPheno.py"}


def _pheno(at: Checkout, **options: Any) -> nn.Module:
    at.package("utils.custom_mlp")
    return at.definitions().scPheno(3, GENES, 2, 2, 3, [8], config_enum="parallel", **COUNTED, **options)


@published("scpheno/unlabelled", **PHENO, **ENUMERATED)
def _(at: Checkout) -> Case:
    return _enumerated(_pheno(at, use_mask=False), counts(GENES))  # its mask takes another size than it is given


@published("scpheno/labelled", labels="ys", conditioned=("y", "k", "k2"), observed="xs", **PHENO)
def _(at: Checkout) -> Case:
    conditions = {"ks": one_hot(2), "ks2": one_hot(2).flip(-1)}
    return Case(_pheno(at, use_mask=False), counts(GENES), one_hot(3), inputs=conditions)


# Its default normalisation of layers needs CUDA.
NETWORKS = {"hidden_layers": [8], "post_layer_fct": None, "use_cuda": False}
FLOWS = dict(input_dim=GENES, z_dim=3, flow_hidden_layers=[8], **NETWORKS)


@published("sure/flow", "ZengFLab/SURE", "SURE/SURE_vanilla.py", observed="xs")
def _(at: Checkout) -> Case:
    return Case(at.definitions().SUREVanilla(**FLOWS), counts(GENES))


@published("sure/flow-covariates", "ZengFLab/SURE", "SURE/SURE_vanilla.py", observed="xs")
def _(at: Checkout) -> Case:
    return Case(at.definitions().SUREVanilla(cov_size=2, **FLOWS), counts(GENES), inputs={"cs": one_hot(2)})


@published("sure/codebook", "ZengFLab/SURE", "SURE/SURE_vae.py", **ENUMERATED)
def _(at: Checkout) -> Case:
    program = at.definitions().SUREVAE(GENES, 4, z_dim=3, **NETWORKS)
    return _enumerated(program, counts(GENES))


def _sure2(at: Checkout, number: int, **options: Any) -> tuple[Any, Any]:
    program = at.definitions().SURE(GENES, codebook_size=4, z_dim=3, **NETWORKS, **options)
    return getattr(program, f"model{number}"), getattr(program, f"guide{number}")


@published("sure2/codebook", "ZengFLab/SUREv2", "SURE/SURE.py", **ENUMERATED)
def _(at: Checkout) -> Case:
    pair = _sure2(at, 1, undesired_size=0)
    return Case(pair, counts(GENES), guide=config_enumerate(pair[1], "parallel", expand=True))


@published("sure2/batches", "ZengFLab/SUREv2", "SURE/SURE.py", **ENUMERATED)
def _(at: Checkout) -> Case:
    pair = _sure2(at, 2, undesired_size=2)
    guide = config_enumerate(pair[1], "parallel", expand=True)
    return Case(pair, counts(GENES), inputs={"us": one_hot(2)}, guide=guide)


@published("sure2/labelled", "ZengFLab/SUREv2", "SURE/SURE.py", observed="xs", labels="ys", conditioned=("n",))
def _(at: Checkout) -> Case:
    return Case(_sure2(at, 3, undesired_size=0), counts(GENES), one_hot(4))


@published("biotic/labelled", "Ying-Lab/BIOTIC", "model.py", kind="coupled-rows",
           observed="xs", labels="ys", conditioned=("y",))  # fmt: skip
def _(at: Checkout) -> Case:
    # The labels of all rows are one event.
    program = at.definitions("device").tre(3, GENES, 3, [8], mask=torch.ones(2, 2).numpy(), mask_size=4)
    return Case(program, counts(GENES), one_hot(3), inputs={"acc_p": real(GENES)})
