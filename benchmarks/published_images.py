"""Published programs for images: invariant and conditional ones, causal ones, digits and faces."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from published_source import ROWS, Case, Checkout, binary, counts, grey, one_hot, published
from pyro.infer import config_enumerate
from torch import Tensor, nn

MNIST = (1, 28, 28)
VED = "ziatdinovmax/pyroVED"
SCM = "biomedia-mira/deepscm"
CAUSAL = "altdeep/causalML"
SMALL = {"hidden_dim_e": [8], "hidden_dim_d": [8], "device": "cpu"}


def _ved(at: Checkout) -> ModuleType:
    return at.package("pyroved.models")


@published("pyroved/ivae", VED, "pyroved/models/ivae.py")
def _(at: Checkout) -> Case:
    return Case(_ved(at).iVAE((8, 8), 2, **SMALL), grey(8, 8))


@published("pyroved/ivae-rotation", VED, "pyroved/models/ivae.py")
def _(at: Checkout) -> Case:
    return Case(_ved(at).iVAE((8, 8), 2, ["r"], **SMALL), grey(8, 8))


@published("pyroved/ivae-rotation-translation-scale", VED, "pyroved/models/ivae.py")
def _(at: Checkout) -> Case:
    return Case(_ved(at).iVAE((8, 8), 2, ["r", "t", "s"], **SMALL), grey(8, 8))


@published("pyroved/ivae-spectra", VED, "pyroved/models/ivae.py")
def _(at: Checkout) -> Case:
    return Case(_ved(at).iVAE((12,), 2, ["t"], sampler_d="gaussian", decoder_sig=0.3, **SMALL), grey(12))


@published("pyroved/ivae-conditional", VED, "pyroved/models/ivae.py", labels="y")
def _(at: Checkout) -> Case:
    return Case(_ved(at).iVAE((8, 8), 2, ["r"], c_dim=3, **SMALL), grey(64), one_hot(3))


@published("pyroved/ivae-annealed", VED, "pyroved/models/ivae.py")
def _(at: Checkout) -> Case:
    return Case(_ved(at).iVAE((8, 8), 2, **SMALL), grey(8, 8), constants={"scale_factor": 2.0})


@published("pyroved/jivae", VED, "pyroved/models/jivae.py", objective="TraceEnum_ELBO")
def _(at: Checkout) -> Case:
    program = _ved(at).jiVAE((8, 8), 2, 3, **SMALL)
    return Case(program, grey(8, 8), guide=config_enumerate(program.guide, "parallel", expand=True))


@published("pyroved/jivae-rotation", VED, "pyroved/models/jivae.py", objective="TraceEnum_ELBO")
def _(at: Checkout) -> Case:
    program = _ved(at).jiVAE((8, 8), 2, 3, ["r"], **SMALL)
    return Case(program, grey(8, 8), guide=config_enumerate(program.guide, "parallel", expand=True))


@published("pyroved/ssivae-unlabelled", VED, "pyroved/models/ssivae.py", objective="TraceEnum_ELBO", observed="xs")
def _(at: Checkout) -> Case:
    program = _ved(at).ssiVAE((8, 8), 2, 3, hidden_dim_cls=[8], **SMALL)
    return Case(program, grey(64), guide=config_enumerate(program.guide, "parallel", expand=True))


@published("pyroved/ssivae-labelled", VED, "pyroved/models/ssivae.py", observed="xs", labels="ys", conditioned=("y",))
def _(at: Checkout) -> Case:
    return Case(_ved(at).ssiVAE((8, 8), 2, 3, ["r"], hidden_dim_cls=[8], **SMALL), grey(64), one_hot(3))


@published("pyroved/ss-reg-unlabelled", VED, "pyroved/models/ss_reg_ivae.py", observed="xs")
def _(at: Checkout) -> Case:
    return Case(_ved(at).ss_reg_iVAE((8, 8), 2, 1, hidden_dim_reg=[8], **SMALL), grey(64))


@published(
    "pyroved/ss-reg-labelled", VED, "pyroved/models/ss_reg_ivae.py", observed="xs", labels="ys", conditioned=("y",)
)
def _(at: Checkout) -> Case:
    return Case(_ved(at).ss_reg_iVAE((8, 8), 2, 1, ["r"], hidden_dim_reg=[8], **SMALL), grey(64), torch.randn(ROWS, 1))


@published("pyroved/ved", VED, "pyroved/models/ved.py", observed="y")
def _(at: Checkout) -> Case:
    # From images to spectra: the guide reads x, the model observes y.
    program = _ved(at).VED((16, 16), (16,), hidden_dim_e=[(4,), (4, 4)], hidden_dim_d=[(4, 4), (4,)], device="cpu")
    return Case(program, grey(1, 16), inputs={"x": grey(1, 16, 16)})


def _scm(at: Checkout, module: str, name: str, **options: Any) -> Case:
    # The mixtures that its distributions import at their head cannot be imported with today's Pyro, and are not used here.
    deep = Checkout(at.root, "deepscm/distributions/deep.py").definitions()
    sys.modules["deepscm.distributions.deep"] = deep
    program = getattr(at.package(f"deepscm.experiments.morphomnist.sem_vi.{module}"), name)(
        hidden_dim=8, latent_dim=3, **options
    )
    about = {"thickness": 2 + torch.rand(ROWS, 1), "intensity": 100 + 80 * torch.rand(ROWS, 1)}
    return Case((program.svi_model, program.svi_guide), 255 * grey(*MNIST), inputs=about)


SEM = {"objective": "TraceGraph_ELBO", "conditioned": ("thickness", "intensity")}
SEM_VI = "deepscm/experiments/morphomnist/sem_vi"


@published("deepscm/conditional", SCM, f"{SEM_VI}/conditional_sem.py", **SEM)
def _(at: Checkout) -> Case:
    return _scm(at, "conditional_sem", "ConditionalVISEM")


@published("deepscm/conditional-learned-variance", SCM, f"{SEM_VI}/conditional_sem.py", **SEM)
def _(at: Checkout) -> Case:
    return _scm(at, "conditional_sem", "ConditionalVISEM", decoder_type="learned_var")


@published("deepscm/independent", SCM, f"{SEM_VI}/independent_sem.py", **SEM)
def _(at: Checkout) -> Case:
    return _scm(at, "independent_sem", "IndependentVISEM", decoder_type="independent_gaussian")


@published("deepscm/conditional-decoder", SCM, f"{SEM_VI}/conditional_decoder_sem.py", **SEM)
def _(at: Checkout) -> Case:
    return _scm(at, "conditional_decoder_sem", "ConditionalDecoderVISEM")


@published("causal-ai/chapter-5", CAUSAL, "book/chapter 5/chapter_5_Connecting_Causality_and_Deep_Learning.ipynb",
           observed="img", conditioned=("digit", "is_handwritten"))  # fmt: skip
def _(at: Checkout) -> Case:
    # Its last argument is the number of rows.
    program = at.definitions("USE_CUDA", "DEVICE_TYPE").VAE(z_dim=3, hidden_dim=8)

    def model(img: Tensor, digit: Tensor, is_handwritten: Tensor) -> Any:
        return program.training_model(img, digit, is_handwritten, len(img))

    def guide(img: Tensor, digit: Tensor, is_handwritten: Tensor) -> Any:
        return program.training_guide(img, digit, is_handwritten, len(img))

    return Case((model, guide), binary(784), inputs={"digit": one_hot(10), "is_handwritten": binary(1)})


def _dsprites(at: Checkout) -> tuple[nn.Module, Tensor, Tensor]:
    program = at.definitions().CVAE(use_cuda=False)
    labels = torch.stack([torch.arange(ROWS) % n for n in program.label_shape], -1).float()
    return program, binary(4096), labels


DSPRITES = tuple(f"y_{name}" for name in ("color", "shape", "scale", "orientation", "posX", "posY"))


@published("causal-ai/dsprites", CAUSAL, "projects/causal_vae_dsprites.ipynb",
           observed="xs", labels="ys", conditioned=DSPRITES)  # fmt: skip
def _(at: Checkout) -> Case:
    # Guide and model both observe the labels, as sites of their own.
    return Case(*_dsprites(at))


@published("swordshieldmouse/vae", "SwordShieldMouse/vae-pyro", "architectures.py")
def _(at: Checkout) -> Case:
    return Case(at.definitions().VAE(3, 8), binary(*MNIST))


@published("rargelaguet/vae", "rargelaguet/pyro_tests", "variational_autoencoder/mnist/vae.py")
def _(at: Checkout) -> Case:
    return Case(at.definitions().VAE(3, 8), binary(*MNIST))


@published("wataruhashimoto52/vae", "wataruhashimoto52/pytorch_examples", "vae_pyro.py")
def _(at: Checkout) -> Case:
    return Case(at.definitions().VAE(3, 8), binary(*MNIST))


@published("hei4/convolutional", "hei4/medium-pyro-pixyz", "pyro_vae.py")
def _(at: Checkout) -> Case:
    return Case(at.definitions(nn=nn).VAE(1, 4), binary(*MNIST))


@published("qbjection/vae", "Qbjection/equivariant-pyro", "pyro_vae.py")
def _(at: Checkout) -> Case:
    return Case(at.definitions().VAE(4, 8), binary(*MNIST))


@published("qbjection/equivariant", "Qbjection/equivariant-pyro", "pyro_vae.py", kind="coupled-rows")
def _(at: Checkout) -> Case:
    # A factor holds the mean of a loss over the batch.
    return Case(at.definitions().VAE(4, 8, equivariant=True, lambda_eq=1.0, lambda_latent_eq=1.0), binary(*MNIST))


@published("musicvae/conditional", "tzs930/pyro_musicvae", "vae.py")
def _(at: Checkout) -> Case:
    module = at.definitions("MAX_SEQ_LEN", "PITCH_DIM", "DATA_DIM")
    return Case(module.VAE(3, 8), binary(5760), inputs={"cond": binary(5760)})


FACES = "desmond-ong/pplAffComp"


@published("affective/faces", FACES, "code/VAE.ipynb")
def _(at: Checkout) -> Case:
    return Case(at.definitions(IMG_SIZE=48, DEFAULT_Z_DIM=3, DEFAULT_HIDDEN_DIMS=8).VAE(3, 8), binary(3, 4, 4))


def _affective(at: Checkout) -> nn.Module:
    module = at.definitions(IMG_SIZE=48, DEFAULT_Z_DIM=3, DEFAULT_HIDDEN_DIMS=[8])
    return module.SSVAE(output_size=2, input_size=48, z_dim=3, hidden_layers=[8])


@published("affective/rated-faces", FACES, "code/SemiSupervisedVAE.ipynb", observed="xs")
def _(at: Checkout) -> Case:
    return Case(_affective(at), binary(48))


@published("affective/rated-faces-labelled", FACES, "code/SemiSupervisedVAE.ipynb",
           observed="xs", labels="ys", conditioned=("y",))  # fmt: skip
def _(at: Checkout) -> Case:
    return Case(_affective(at), binary(48), grey(2))


ALLOYS = {"repository": "cengc13/d_vae_hea", "path": "notebooks/1_SSVAE_Model_training.ipynb", "observed": "xs"}


def _alloys(at: Checkout) -> nn.Module:
    at.package("utils.custom_mlp")
    module = at.definitions("use_cuda", "device", "BATCH_SIZE", "DEFAULT_HIDDEN_DIMS", "DEFAULT_Z_DIM")
    return module.SSVAE(output_size=1, input_size=30, z_dim=2, hidden_layers=[8])


@published("alloys/unlabelled", **ALLOYS)
def _(at: Checkout) -> Case:
    return Case(_alloys(at), counts(30, rate=2.0), inputs={"es": torch.randn(ROWS, 8)})


@published("alloys/labelled", labels="ys", conditioned=("y",), **ALLOYS)
def _(at: Checkout) -> Case:
    return Case(_alloys(at), counts(30, rate=2.0), binary(1), inputs={"es": torch.randn(ROWS, 8)})
