"""Put code into every file that the package reads, and read it in every way there is.

`tests/support/hostile.py` holds payloads of model folders, `tests/support/hostile_files.py` those
of saved SAEs, checkpoints, text, tables of features, configurations and the paper's checkpoints:
pickles in place of each file and under the names that other libraries unpickle, modules by names
that are imported, configurations that ask for trust, YAML tags, extension types of Arrow. Each
would write a marker. First each is executed as no reader may (unpickled, imported, rendered), which
must write the marker. Then the folder is read by every function and command that reads its kind,
from within the folder, and no marker may appear.

    python benchmarks/reliability/payloads.py
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled"}

import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from support.command_line import as_options, call  # noqa: E402
from support.execution import runs_when_executed  # noqa: E402
from support.hostile import MODEL_PAYLOADS, saved_sae  # noqa: E402
from support.hostile_files import (  # noqa: E402
    RUN,
    Payload,
    good_files,
    model_payload,
    payloads,
)
from support.small import TINYLLAMA  # noqa: E402

from sae_lens_route.data.text import load_text_dataset  # noqa: E402
from sae_lens_route.errors import UserError  # noqa: E402
from sae_lens_route.features.table import FeatureTable  # noqa: E402
from sae_lens_route.models.load import MODEL_CLASS_NAMES, load_model  # noqa: E402
from sae_lens_route.saes.reference_checkpoint import reference_converter  # noqa: E402
from sae_lens_route.saes.saved import load_saved_sae  # noqa: E402

PACKAGE = ROOT / "sae_lens_route"
RESULTS = ROOT / "benchmarks" / "results" / "reliability" / "payloads.json"
NAMES_ONLY = {"attention_kernel", "nested_kernel"}
"""Payloads that are a name of code on the Hub: nothing in the folder could be executed."""

Way = Callable[[Path], Any]


def load_checkpoint(folder: Path) -> Any:
    """SAELens's loader of the SAE in a checkpoint."""
    return TrainingSAE.load_from_disk(next(folder.rglob("run_state.json")).parent)


SAELENS: tuple[Way, ...] = (SAE.load_from_disk, load_checkpoint)
"""SAELens's own reading raises what it raises, before this package is asked."""

EXPECTED = ("refused", "read", "SAELens's error")
SMALL_TEXT = ("--max-tokens", 128)
STEER = ("import", "--edit", "3:set:5", "--max-new-tokens", 2)


def ways(good: dict[str, Path], out: Path) -> dict[str, dict[str, Way]]:
    """How a folder of each kind is read; what commands write goes to `out`."""
    sae = good["sae"]
    run = as_options({**RUN, "output_path": out})
    page = ("--n-features", 2, *SMALL_TEXT, "--output", out / "page.html")

    def convert(folder: Path) -> Any:
        converter = reference_converter(k=4, routed_blocks=[3, 5, 6])
        return SAE.load_from_disk(folder / "RouteSAE.pt", converter=converter)

    def on_text(folder: Path) -> dict[str, Way]:
        return {
            "load_text_dataset": lambda f: next(iter(load_text_dataset(str(f)))),
            "load_text_dataset, whole": lambda f: load_text_dataset(str(f), streaming=False)[0],
            "eval": lambda f: call(
                "eval", sae, "--dataset", f, *SMALL_TEXT, "--output", out / "eval.json"
            ),
            "train": lambda f: call("train", *run, "--dataset-path", f),
        }

    return {
        "sae": {
            "load_saved_sae": load_saved_sae,
            "SAE.load_from_disk": SAE.load_from_disk,
            "info": lambda f: call("info", f),
            "eval": lambda f: call("eval", f, *SMALL_TEXT, "--output", out / "eval.json"),
            "features": lambda f: call("features", f, *SMALL_TEXT, "--output", out / "features"),
            "dashboard": lambda f: call("dashboard", f, *page),
            "steer": lambda f: call("steer", f, *STEER),
        },
        "checkpoint": {
            "train --resume": lambda f: call("train", "--resume", f),
            "train --resume, the checkpoint": lambda f: call(
                "train", "--resume", next(f.rglob("run_state.json")).parent
            ),
            "train --resume-from-checkpoint": lambda f: call(
                "train", *run, "--resume-from-checkpoint", f
            ),
            "TrainingSAE.load_from_disk": load_checkpoint,
        },
        "text": on_text(sae),
        "dataset": on_text(sae),
        "features": {
            "FeatureTable.from_parquet": FeatureTable.from_parquet,
            "interpret": lambda f: call("interpret", f),
            "interpret --agreement SHEET": lambda f: call(
                "interpret", f, "--agreement", f / "sheet.csv"
            ),
            "interpret --agreement JUDGE": lambda f: call(
                "interpret", f, "--agreement", f / "judge.jsonl"
            ),
            "dashboard --features": lambda f: call("dashboard", sae, "--features", f, *page),
            "steer --features": lambda f: call("steer", sae, *STEER, "--features", f),
        },
        "config": {
            "train --config": lambda f: call(
                "train", "--config", f / "run.yaml", "--output-path", out
            ),
            "sweep --config": lambda f: call(
                "sweep", "--config", f / "sweep.yaml", "--output-path", out, "--dry-run"
            ),
            "reproduce --config": lambda f: call(
                "reproduce", "--config", f / "run.yaml", "--output", out, "--eval-tokens", 0
            ),
            "train --lr": lambda f: call("train", *run, "--lr", _value_of_lr(f / "run.yaml")),
        },
        "reference": {"reference_converter": convert},
    }


def model_ways(out: Path) -> dict[str, Way]:
    """How a model folder is read: named by a saved SAE, or by the user."""
    found: dict[str, Way] = {}
    for kind in MODEL_CLASS_NAMES:
        saved = partial(_sae_that_names, out / "sae", load_model(TINYLLAMA, kind), kind)
        run = as_options({**RUN, "output_path": out / "run"})
        found |= {
            f"eval of an SAE, {kind}": lambda f, saved=saved: call("eval", saved(f), *SMALL_TEXT),
            f"steer with an SAE, {kind}": lambda f, saved=saved: call("steer", saved(f), *STEER),
            f"train, {kind}": lambda f, kind=kind, run=run: call(
                "train", *run, "--model-name", f, "--model-class-name", kind
            ),
        }
    return found


def _sae_that_names(sae: Path, model: Any, kind: str, folder: Path) -> Path:
    return saved_sae(sae, model, str(folder), model_class_name=kind, dataset_path="demo")


def result_of(way: Way, folder: Path) -> str:
    """One of `EXPECTED`, or the name and text of another exception."""
    try:
        result = way(folder)
    except UserError:
        return "refused"
    except Exception as error:
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if way in SAELENS and not any(str(PACKAGE) in file for file in files):
            return "SAELens's error"
        return f"{type(error).__name__}: {error}"
    if getattr(result, "exit_code", 0) == 2:
        return "refused"
    error = getattr(result, "exception", None)
    return "read" if error is None else f"{type(error).__name__}: {error}"


def cases(work: Path, out: Path) -> Iterator[tuple[str, str, Payload, Path | None, dict[str, Way]]]:
    """Kind, name, payload, the good folder to change and the ways to read the changed one."""
    good = good_files(work / "good")
    by_kind = ways(good, out)
    for kind, folder in good.items():
        for name, payload in payloads(kind, folder).items():
            yield kind, name, payload, folder, by_kind[kind]
    read = model_ways(out)
    for name in MODEL_PAYLOADS:
        yield "model", name, model_payload(name), None, read


def main() -> None:
    """Read everything, print and write what ran."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--kind", help="only this kind")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    kinds: dict[str, dict[str, Any]] = {}
    ran: list[str] = []
    duds: list[str] = []
    exceptions: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        work, out = Path(temporary), Path(temporary) / "out"
        folder, marker = work / "hostile", work / "ran"
        for kind, name, payload, good, read in cases(work, out):
            if arguments.kind not in (None, kind):
                continue
            counts = kinds.setdefault(
                kind, {"payloads": 0, "ran when executed": 0, "read in": list(read), "results": {}}
            )
            counts["payloads"] += 1
            _place(payload, good, folder, marker)
            if name not in NAMES_ONLY:
                executed = runs_when_executed(folder, marker)
                counts["ran when executed"] += executed
                duds += [] if executed else [f"{kind}: {name}"]
            results = Counter(counts["results"])
            for way_name, way in read.items():
                _place(payload, good, folder, marker)
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                os.chdir(folder)
                result = result_of(way, folder)
                os.chdir(work)
                results[result.partition(":")[0]] += 1
                if marker.exists():
                    marker.unlink()
                    ran.append(f"{kind}: {name}: {way_name}")
                if result not in EXPECTED:
                    exceptions.append(f"{kind}: {name}: {way_name}: {result}"[:300])
            counts["results"] = dict(sorted(results.items()))
    content = {
        "command": "python benchmarks/reliability/payloads.py",
        "versions": {
            name: version(name)
            for name in ("torch", "sae-lens", "transformers", "datasets", "pyarrow", "pyyaml")
        },
        "seconds": time.perf_counter() - start,
        "payloads": sum(each["payloads"] for each in kinds.values()),
        "reads": sum(sum(each["results"].values()) for each in kinds.values()),
        "kinds": kinds,
        "ran": ran,
        "did not run when executed": duds,
        "other exceptions": exceptions,
    }
    for kind, each in kinds.items():
        print(f"{kind:11} {each['payloads']} payloads, {each['results']}")
    print(f"{len(ran)} ran", *ran, *duds, *exceptions, f"{content['seconds']:.0f} s", sep="\n")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    if ran or duds or exceptions:
        raise SystemExit(1)


def _value_of_lr(file: Path) -> str:
    return file.read_text(errors="replace").partition("lr: ")[2]


def _place(payload: Payload, good: Path | None, folder: Path, marker: Path) -> None:
    """A changed copy of the good folder."""
    shutil.rmtree(folder, ignore_errors=True)
    if good is None:
        folder.mkdir()
    else:
        shutil.copytree(good, folder)
    payload(folder, marker)


if __name__ == "__main__":
    main()
