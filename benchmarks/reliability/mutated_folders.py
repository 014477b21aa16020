"""Load saved SAEs with one thing wrong, thousands of them, in every way there is.

`tests/support/mutants.py` makes the mutants of 18 good folders (nine kinds of SAE, each as it is
saved now and as before 0.1.0, without digests), in each copy one change of `cfg.json` (fields
removed, renamed, retyped, replaced; lists; the architecture; metadata; damaged JSON), of the
weights (values, shapes, names, dtypes; flipped bits, headers, lengths) or of the files. Three ways
to load:

    command     `load_saved_sae`, which the commands use
    SAELens     `SAE.load_from_disk` itself, without the reading of files that is ours
    info        the command `info`: JSON or one line

What is accepted must be what the files say: the function of the loaded SAE is computed again from
the files alone, in float64, and metadata is compared with itself. Where digests are, the weights
must be bit-identical to those that were saved.

    python benchmarks/reliability/mutated_folders.py --n 20000 --seed 1
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from support.mutant_outcomes import outcome, time_limit  # noqa: E402
from support.mutants import Mutant, mutants  # noqa: E402
from support.saved_folders import good_folders  # noqa: E402

from sae_lens_route.cli import app  # noqa: E402
from sae_lens_route.errors import UserError  # noqa: E402
from sae_lens_route.saes.saved import load_saved_sae  # noqa: E402
from sae_lens_route.saes.streams import StreamsSAEMixin  # noqa: E402

PACKAGE = ROOT / "sae_lens_route"
SCRIPT = "benchmarks/reliability/mutated_folders.py"
RESULTS = ROOT / "benchmarks" / "results" / "reliability" / "mutated_folders.json"
EXPECTED = {"refused", "as saved", "as the files say", "JSON", "one line"}


def info(mutant: Mutant) -> str:
    """What the command `info` comes to."""
    try:
        with time_limit(10):
            result = CliRunner().invoke(app, ["info", str(mutant.folder)])
    except TimeoutError:
        return "hang"
    if result.exit_code == 0:
        json.loads(result.stdout)
        return "JSON"
    lines = result.output.splitlines()
    one_line = result.exit_code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return "one line" if one_line else f"{type(result.exception).__name__}: {result.exception}"


def saelens(mutant: Mutant) -> str:
    """What SAELens's own loader comes to."""
    if not all(path.is_file() for path in mutant.folder.iterdir()):
        return "SAELens's error"  # it would wait for a pipe
    result = outcome(_load_with_saelens, mutant)
    return "SAELens's error" if result.startswith("_SAELensError") else result


class _SAELensError(Exception):
    """Raised by SAELens's reading of the files, before this package is asked."""


def _load_with_saelens(folder: Path) -> SAE[Any]:
    try:
        sae = SAE.load_from_disk(folder)
    except UserError:
        raise
    except Exception as error:
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if any(str(PACKAGE) in file for file in files):
            raise
        raise _SAELensError from error
    if not isinstance(sae, StreamsSAEMixin):  # its architecture was changed to one of SAELens's
        raise _SAELensError
    return sae


def main() -> None:
    """Load the mutants, print and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # SAELens's own about files
    counts: dict[str, Counter[str]] = {
        "command": Counter(),
        "SAELens": Counter(),
        "info": Counter(),
    }
    kinds: dict[str, Counter[str]] = {}
    failures: list[str] = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bases = good_folders(Path(folder) / "good")
        for mutant in mutants(bases, arguments.n, Path(folder), arguments.seed):
            results = {
                "command": outcome(load_saved_sae, mutant),
                "SAELens": saelens(mutant),
                "info": info(mutant),
            }
            kinds.setdefault(mutant.kind, Counter())[results["command"]] += 1
            for way, result in results.items():
                counts[way][result.partition(":")[0]] += 1
                if result not in EXPECTED | {"SAELens's error"}:
                    failures.append(f"{way}: {mutant.base.name}: {mutant.kind}: {result}"[:300])
    content = {
        "command": f"python {SCRIPT} --n {arguments.n} --seed {arguments.seed}",
        "versions": {name: version(name) for name in ("torch", "sae-lens", "safetensors")},
        "seconds": time.perf_counter() - start,
        "counts": {way: dict(sorted(each.items())) for way, each in counts.items()},
        "kinds": {kind: dict(sorted(each.items())) for kind, each in sorted(kinds.items())},
        "failures": failures,
    }
    for way, each in counts.items():
        print(f"{way:8}", ", ".join(f"{name}: {n}" for name, n in each.most_common()))
    for kind, each in sorted(kinds.items()):
        print(f"  {kind:28}", ", ".join(f"{name}: {n}" for name, n in each.most_common()))
    print(f"{len(failures)} failures", *failures[:20], sep="\n")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
