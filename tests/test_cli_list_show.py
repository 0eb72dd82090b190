"""pyro-vae list and pyro-vae show."""

import json
import re
import time

import pytest
import torch

import pyro_vae as pv
from pyro_vae import registry
from pyro_vae.cli import costs
from pyro_vae.cli.app import run
from pyro_vae.cli.list_ import KINDS
from pyro_vae.data.names import DATA_SETS
from pyro_vae.declared import names
from pyro_vae.seeding import seeded


def output(capsys, *args):
    """Standard output of a command that succeeds and says nothing else."""
    assert run(list(args)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


@pytest.mark.parametrize("kind", KINDS)
def test_list_prints_a_table_with_every_name(capsys, kind):
    head, rule, *rows = output(capsys, "list", kind).splitlines()
    expected = {
        "models": lambda: names("models"),
        "guides": lambda: names("guides"),
        "data": lambda: list(DATA_SETS),
        "networks": lambda: registry.names("encoders") + registry.names("decoders"),
    }.get(kind, lambda: registry.names(kind))()
    assert [cells(row)[0] for row in rows] == expected
    assert set(rule) == {"|", "-"}
    assert {len(cells(line)) for line in rows} == {len(cells(head))}
    assert all(cells(row)[1] for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_list_as_json(capsys, kind):
    found = json.loads(output(capsys, "list", kind, "--json"))
    assert found["kind"] == kind
    assert all(entry["name"] for entry in found["entries"])


def test_options_have_types_and_defaults(capsys):
    text = output(capsys, "list", "likelihoods")
    assert 'scale = "shared" (number > 0, "shared", "per-pixel" or "decoder")' in text
    assert r"p(x \| z) = prod_d Bernoulli" in text
    found = json.loads(output(capsys, "list", "priors", "--json"))
    mixture = next(e for e in found["entries"] if e["name"] == "gaussian-mixture")
    assert mixture["options"]["components"] == {"type": "integer >= 1 and <= 1,000,000", "default": 10}
    assert mixture["support"] == "real vector"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["list", "prior"], "did you mean 'priors'"),
        (["show", "mlpp"], "did you mean 'mlp'"),
        (["show", "mlp", "diagonl"], "did you mean 'diagonal'"),
        (["show", "mlp", "--shape", "1,x"], "--shape '1,x'"),
        (["show", "mlp", "--shape", "0"], "positive"),
        (["show", "mlp", "--set", "latent_dmi=2"], "did you mean 'latent_dim'"),
        (["show", "conv-2d", "conv", "--shape", "784"], "even height and width"),
        (["show", "mlp", "nowhere/guide.toml"], "no guide file"),
    ],
)
def test_what_the_user_can_mend(capsys, args, message):
    assert run(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_show_tells_formula_sites_parameters_declaration_and_python(capsys):
    text = output(capsys, "show", "mixture", "diagonal", "--shape", "1,8,8", "--set", "latent_dim=5")
    program = pv.build("mixture", "diagonal", (1, 8, 8), latent_dim=5)
    assert "p(z) = sum_k w_k N(mu_k, diag s_k^2)" in text
    assert "| model   | z    | DiagonalMixture | (batch,)" in text
    assert f"## Parameters: {sum(p.numel() for p in program.parameters()):,}\n" in text
    assert all(f"| {name} " in text for name, _ in program.named_parameters())
    toml = text.partition("```toml\n")[2].partition("```")[0]
    assert pv.Spec.from_toml(toml) == program.spec


def test_show_python_alone_can_be_run(capsys):
    whole = output(capsys, "show", "mlp", "--shape", "6", "--set", "decoder.hidden=[4]", "--set", "encoder.hidden=[4]")
    source = output(
        capsys, "show", "mlp", "--shape", "6", "--set", "decoder.hidden=[4]", "--set", "encoder.hidden=[4]", "--python"
    )
    assert source.strip() in whole
    pasted: dict = {"__name__": "pasted"}
    with seeded(0):
        exec(source, pasted)
    own = pasted["program"]
    run_ = pv.fit(own, torch.zeros(20, 6), steps=2, batch_size=10)
    assert run_.program is own
    built = pv.build("mlp", "diagonal", (6,), decoder="mlp:hidden=[4]", encoder="mlp:hidden=[4]")
    built.load_state_dict(own.state_dict())


def test_show_counts_parameters_that_are_held_fixed(capsys):
    text = output(capsys, "show", "mixture", "--shape", "4", "--set", "prior.learned=false")
    assert "held fixed" in text


def test_show_a_program_of_a_file(capsys, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "# p(x) = N(w, 1)\n"
        "import pyro, torch, pyro.distributions as dist\n"
        "from torch import nn\n"
        "class Own(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.w = nn.Parameter(torch.zeros(3))\n"
        "    def model(self, x):\n"
        "        with pyro.plate('data', x.shape[0], dim=-1):\n"
        "            pyro.sample('x', dist.Normal(self.w, 1.0).to_event(1), obs=x)\n"
        "    def guide(self, x):\n"
        "        pass\n"
        "def program(event_shape):\n"
        "    return Own()\n"
    )
    text = output(capsys, "show", str(file), "--shape", "3")
    assert "p(x) = N(w, 1)" in text
    assert "| w         | (3,)  | 3     |" in text
    assert "observed" in text
    assert run(["show", str(file), "diagonal"]) == 2
    assert "its own guide" in capsys.readouterr().err


def test_list_alone_lists_the_kinds(capsys):
    assert [line.split()[0] for line in output(capsys, "list").splitlines()] == list(KINDS)
    assert json.loads(output(capsys, "list", "--json"))["kinds"] == list(KINDS)


def test_models_say_their_network_parameters_and_cost(capsys):
    found = {e["name"]: e for e in json.loads(output(capsys, "list", "models", "--json"))["entries"]}
    for name in names("models"):
        entry = found[name]
        if entry["network"] == "its own":
            continue
        spec = pv.Spec(model=pv.spec.read("models", name)).model
        assert (entry["network"], entry["likelihood"]) == (str(spec.network), str(spec.likelihood))
        assert entry["parameters"] > 1000
    built = pv.build("ppca", "diagonal", (1, 28, 28))
    assert found["ppca"]["parameters"] == sum(p.numel() for p in built.parameters())
    cost = {name: float(e["step (mlp = 1)"].rstrip(" x") or 0) for name, e in found.items()}
    assert cost["mlp"] == 1
    assert cost["discretized-logistic"] > 20  # a residual network
    assert cost["beta"] < 2


def test_the_table_of_costs_is_what_is_computed():
    """python -m pyro_vae.cli.costs writes it anew."""
    found, kept = costs.computed(), costs.table()
    assert list(found) == list(kept)
    for name, entry in found.items():
        assert {k: v for k, v in entry.items() if k != "flops"} == {k: v for k, v in kept[name].items() if k != "flops"}


def test_a_wrong_data_name_is_refused_before_torch_is_imported(python):
    code = (
        "import sys\nfrom pyro_vae.cli.app import run\n"
        "assert run(['train', 'mnits']) == 2\nassert run(['train', 'no/such.npy']) == 2\nassert 'torch' not in sys.modules\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "did you mean 'mnist'" in done.stderr


def test_a_long_compilation_says_so_while_it_happens(monkeypatch, capsys):
    from pyro_vae.training import compiling

    monkeypatch.setattr(compiling, "LONG_SECONDS", 0.05)
    with compiling._told_if_long():
        time.sleep(0.3)
        assert "still compiling the step" in capsys.readouterr().err
    with compiling._told_if_long():
        pass
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_machine_without_cuda_is_not_told_so(python):
    code = (
        "import torch, pyro_vae as pv\n"
        "pv.fit(pv.build('ppca', 'linear', (3,), latent_dim=2), torch.randn(60, 3), steps=5, compile='on', device='cpu')\n"
    )
    done = python("-c", code, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
