"""How long the step of every declared model and guide takes to compile: with empty caches, and again in a new process.

    python benchmarks/compile_time.py [--threads 2] [--only vamp autoregressive] [--limit 60]

Every file of models/ is paired with a guide that fits it, and every file of guides/ with a model: the namesake if there is one.
Data are the embedded digits, as the likelihood wants them (binarized, on 256 levels, as counts, ...). The seconds are those of
``pv.fit(..., steps=1, compile="on")`` without the first import: capturing, compiling and one step. One process at a time. A pair
that cannot be captured trains uncompiled, and is listed with the reason. Writes benchmarks/results/compile_time.json and .md;
what is there already is not measured again unless named by ``--only``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from turns import described, environment, machine, num_cores

RESULTS = Path(__file__).parent / "results"
PARTNER_GUIDE = {
    "real": "diagonal",
    "Boolean": "relaxed-bernoulli",
    "OneHot": "relaxed-categorical",
    "phere": "hypersphere",
}
PARTNER_MODEL = {"real": "mlp", "Boolean": "binary-latents", "OneHot": "categorical-latents", "phere": "hypersphere"}
BATCH = 128


def pairs() -> list[tuple[str, str]]:
    """Model and guide, every declared file at least once."""
    from pyro_vae import registry
    from pyro_vae.declared import folder
    from pyro_vae.spec import declared, read

    def partner(support: Any, partners: dict[str, str]) -> str:
        return next((p for kind, p in partners.items() if kind in repr(support)), partners["real"])

    models, guides = ([n for n in declared(k) if (folder(k) / f"{n}.toml").is_file()] for k in ("models", "guides"))
    found = {}
    for name in models:
        prior: Any = registry.get("priors", read("models", name).prior.name)
        found[name, name if name in guides else partner(prior.support, PARTNER_GUIDE)] = None
    for name in guides:
        posterior: Any = registry.get("posteriors", read("guides", name).posterior.name)
        found[name if name in models else partner(posterior.support, PARTNER_MODEL), name] = None
    return list(found)


def observations(likelihood: Any) -> Any:
    """The digits in the support of a likelihood: the data set itself where it is binarized, else a tensor."""
    import torch

    import pyro_vae as pv

    data = pv.load_data("digits")
    if likelihood.data == "binary":
        return data
    grey = data.with_(binarization="none").observed("train")
    noise = torch.rand(grey.shape, generator=torch.Generator().manual_seed(0))
    if likelihood.data == "lattice":
        return (grey * (likelihood.levels - 1)).round() / (likelihood.levels - 1)
    return {
        "count": (16 * grey).round(),
        "unit": (16 * grey + 0.01 + 0.98 * noise) / 17,
        "real": (16 * grey + noise) / 17,
    }[likelihood.data]


def one(model: str, guide: str, threads: int) -> dict[str, Any]:
    """Compile in this process: the seconds, or why not."""
    import torch

    import pyro_vae as pv
    from pyro_vae.capture import CaptureWarning

    torch.set_num_threads(threads)
    data = pv.load_data("digits")
    shape = data.event_shape
    vae = pv.build(model, guide, data if pv.build(model, guide, shape).likelihood.data == "binary" else shape)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        run = pv.fit(vae, observations(vae.likelihood), steps=1, batch_size=BATCH, compile="on", device="cpu")
    reasons = [str(w.message) for w in heard if issubclass(w.category, CaptureWarning)]
    parameters = sum(p.numel() for p in vae.parameters())
    return {"reason": reasons[0]} if reasons else {"seconds": run.metrics[0]["seconds"], "parameters": parameters}


def measure(model: str, guide: str, threads: int, limit: float) -> dict[str, Any]:
    """Twice, each in a new process: with an empty cache, and with what the first left there."""
    found: dict[str, Any] = {"model": model, "guide": guide}
    with tempfile.TemporaryDirectory() as cache:
        for which in ("cold", "cached"):
            load = os.getloadavg()[0]
            command = [sys.executable, __file__, "--one", model, guide, "--threads", str(threads)]
            settings = {**os.environ, **environment(threads), "TORCHINDUCTOR_CACHE_DIR": cache}
            began = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, env=settings)
            if done.returncode:
                print(done.stderr[-2000:], file=sys.stderr)
                return found | {"reason": f"failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:200]}"}
            told = json.loads(done.stdout.splitlines()[-1])
            if "reason" in told:
                return found | told
            found |= {which: told["seconds"], f"{which}_process": time.perf_counter() - began, f"{which}_load": load}
            found["parameters"] = told["parameters"]
    found["within_limit"] = found["cold"] < limit
    return found


def report(kept: dict[str, Any], limit: float) -> str:
    """Slowest first, then those that cannot be compiled."""
    found = list(kept["pairs"].values())
    done = sorted((f for f in found if "cold" in f), key=lambda f: -f["cold"])
    lines = [
        f"Seconds from `pv.fit` with `compile` on to the end of the first step; digits, batch {BATCH}, "
        f"{kept['threads']} thread(s).",
        "",
        "| model | guide | parameters | cold (s) | from the cache, in a new process (s) | load average |",
        "|---|---|---|---|---|---|",
        *(
            f"| {f['model']} | {f['guide']} | {f['parameters']:,} | {f['cold']:.1f} | {f['cached']:.1f} | "
            f"{f['cold_load']:.1f} |"
            for f in done
        ),
        "",
    ]
    if done:
        late = sum(not f["cold"] < limit for f in done)
        slowest = max(f["cached"] for f in done)
        lines.append(
            f"At most {done[0]['cold']:.1f} s cold and {slowest:.1f} s from the cache, of {len(done)} pairs; "
            f"{late} of them above {limit:g} s. Load averages above the threads used mean that other work disturbed the timings."
        )
    lines += [f"- {f['model']} with {f['guide']} is not captured: {f['reason']}" for f in found if "reason" in f]
    return "\n".join([*lines, "", f"{described(kept['machine'])}."])


def main() -> None:
    """Measure what is missing, and write the table after every pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="models or guides, to be measured anew")
    parser.add_argument("--limit", type=float, default=60, help="seconds that a cold compilation may take")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "GUIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(*args.one, args.threads)))
        return
    path = RESULTS / "compile_time.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"pairs": {}}
    kept |= {"threads": args.threads, "machine": machine()}
    RESULTS.mkdir(exist_ok=True)
    for model, guide in pairs():
        key, named = f"{model} {guide}", bool({model, guide} & set(args.only))
        if named or (not args.only and key not in kept["pairs"]):
            kept["pairs"][key] = measure(model, guide, args.threads, args.limit)
            print(kept["pairs"][key], flush=True)
            path.write_text(json.dumps(kept, indent=2) + "\n")
            (RESULTS / "compile_time.md").write_text(report(kept, args.limit) + "\n")
    print(report(kept, args.limit))


if __name__ == "__main__":
    main()
