"""What resuming a shuffled run costs: running passes again, or writing the buffer to the disk.

    python benchmarks/reliability/shuffle_buffer.py --n 20

The demo model, blocks 3 to 11, `--n` forward passes in the buffer, half of it kept in each round.
The buffer is filled, 15 rounds are served, and then it is made again from its position (as the
package does), and written and read as a file (as it does not).
"""

import argparse
import json
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sae_lens_route import RouteTopKTrainingSAEConfig
from sae_lens_route.config import RouteSAERunnerConfig
from sae_lens_route.data.activations import RoutedActivationsStore
from sae_lens_route.models.load import load_model, model_width

RESULTS = Path(__file__).parents[1] / "results" / "reliability" / "shuffle_buffer.json"


def seconds(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=20, help="forward passes in the buffer")
    parser.add_argument("--output", type=Path, default=RESULTS)
    n = parser.parse_args().n
    output = parser.parse_args().output
    model = load_model("demo")
    cfg = RouteSAERunnerConfig(
        sae=RouteTopKTrainingSAEConfig(d_in=model_width("demo", "HookedTransformer"), d_sae=64),
        model_name="demo",
        dataset_path="demo",
        context_size=128,
        store_batch_size_prompts=16,
        activations_mixing_fraction=0.5,
        n_batches_in_buffer=n,
    )
    cfg.resolve(model)
    store = RoutedActivationsStore.from_config(model, cfg)
    first_fill, _ = seconds(lambda: next(store))
    for _ in range(15 * n // 2):
        next(store)
    state = store.state_dict()
    expected = next(store)
    again = store.from_the_start()
    again.load_state(state)
    refill, actual = seconds(lambda: next(again))
    assert torch.equal(expected, actual)
    buffer = torch.zeros((store.buffer_tokens, *expected.shape[1:]), dtype=expected.dtype)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "buffer.safetensors"

        def save():
            save_file({"buffer": buffer}, file)
            with file.open() as opened:
                os.fsync(opened.fileno())

        write, _ = seconds(save)
        read, _ = seconds(lambda: load_file(file)["buffer"].clone())
    result = {
        "command": f"python benchmarks/reliability/shuffle_buffer.py --n {n}",
        "versions": {name: version(name) for name in ("torch", "sae-lens", "safetensors")},
        "passes": n,
        "rows": len(buffer),
        "buffer_mb": buffer.nbytes / 1e6,
        "position_mb": sum(each.nbytes for each in state.values()) / 1e6,
        "passes_run_again": len(state["buffer_sources"][:, 0].unique()),
        "seconds": {
            "first filling": first_fill,
            "made again, once per resume": refill,
            "written, once per checkpoint": write,
            "read, once per resume": read,
        },
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"| {n} passes, {len(buffer):,} rows | |\n|---|---|")
    for name, value in result["seconds"].items():
        print(f"| {name} | {value:.2f} s |")
    print(f"| buffer | {result['buffer_mb']:.0f} MB |")
    print(f"| position | {result['position_mb']:.1f} MB |")
    print(f"| passes run again | {result['passes_run_again']} |")


if __name__ == "__main__":
    main()
