"""The script that prints the seeds' table: its rows are commands that exist, and it reads what they leave."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import pyro_vae as pv
from pyro_vae import registry
from pyro_vae.cli.app import run


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "seeds_table.py"
    spec = importlib.util.spec_from_file_location("seeds_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["seeds_table"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_row_is_a_command_and_stands_in_one_table(script: ModuleType) -> None:
    for name, row in script.ROWS.items():
        command, *words = row.train.split()
        assert row.table in script.TABLES, name
        assert row.after in ("", *script.ROWS), name
        assert command in ("train", "baseline"), name
        if row.baseline:
            assert words[0] in registry.names("baselines"), name
        data = words[1] if row.baseline else words[0]
        assert data == ("static-mnist" if row.table == "static" else "mnist"), name


def test_what_runs_and_baselines_leave_becomes_three_tables(script: ModuleType, tmp_path: Path) -> None:
    small = ["--set", "hidden=4", "--epochs", "1", "--chains", "5", "--distributions", "5", "--quiet"]
    assert run(["baseline", "rbm", "digits", *small, "--out", str(tmp_path / "rbm")]) == 0
    vae = pv.build("ppca", "linear", (3,), latent_dim=2)
    pv.fit(
        vae,
        pv.Data("toy", *torch.arange(270.0).sin().reshape(3, 30, 3), None),
        epochs=1,
        compile="off",
        out=tmp_path / "vae",
    )
    assert script.parameters(tmp_path / "vae" / "weights.safetensors") == sum(
        t.numel() for t in vae.state_dict().values()
    )
    assert script.finished(tmp_path / "vae")
    assert not script.finished(tmp_path)
    row = script.Row("static", "machine", "baseline rbm digits", printed="86")
    assert script.figures(row, tmp_path) is None
    text = script.tables({"rbm": script.figures(row, tmp_path / "rbm")})
    assert "| machine | " in text
    assert text.count("Not trained yet.") == 2
    assert script.computed({"states": 500}) == "exact, 500 states"
    assert script.computed({"num_samples": 1000, "khat_bad_fraction": 0.25}) == "IW at K = 1,000 (25% bad k)"
