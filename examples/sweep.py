"""Compare dictionaries trained on one stream of activations. The demo model stands in for yours.

The language model runs once for all of them; each result equals that of a separate run.
"""

import sys

from sae_lens_route import RouteSAERunnerConfig, RouteTopKTrainingSAEConfig, SweepRunner
from sae_lens_route.evals.comparison import evaluate_sweep
from sae_lens_route.plots import TradeoffPoint, tradeoff, write_figure
from sae_lens_route.training.entries import expand_runs

output = sys.argv[1] if len(sys.argv) > 1 else "sweep"
training_tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000
eval_tokens = int(sys.argv[3]) if len(sys.argv) > 3 else 20_000

config = RouteSAERunnerConfig(
    sae=RouteTopKTrainingSAEConfig(d_in=128, d_sae=1024),  # a sweep takes only the width from it
    model_name="demo",
    dataset_path="demo",
    context_size=256,
    store_batch_size_prompts=8,
    training_tokens=training_tokens,
    output_path=output,
)
runs = {
    "RouteSAE": {"d_sae": 1024, "k": [8, 16, 32]},
    "random routing": {"d_sae": 1024, "k": [8, 16, 32], "routing": "uniform"},
    "block 11 alone": {"d_sae": 1024, "k": [8, 16, 32], "blocks": [11]},
}
entries = expand_runs(runs, d_in=128, seeds=[0])
runner = SweepRunner(config, entries)
saes = runner.run()

table = evaluate_sweep(runner.model, entries, saes, "demo:heldout", max_tokens=eval_tokens)
table.write(output)
points = [TradeoffPoint.of(row, row.kl) for row in table.rows]
write_figure(tradeoff(points, "KL, nats per token"), f"{output}/kl_by_l0")
for row in table.rows:
    print(f"{row.name:24} NormMSE {row.norm_mse:.3f}  KL {row.kl:.3f} nats per token")
