"""Train a RouteSAE from Python. The demo model stands in for yours; nothing is downloaded.

For Llama-3.2-1B as in the paper:
`RouteSAERunnerConfig.from_file("examples/configs/llama-3.2-1b-instruct.yaml", device="cuda")`.
"""

import sys

from sae_lens_route import (
    RouteSAERunnerConfig,
    RouteSAETrainingRunner,
    RouteTopKTrainingSAEConfig,
)

output = sys.argv[1] if len(sys.argv) > 1 else "route-sae"
training_tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000

config = RouteSAERunnerConfig(
    sae=RouteTopKTrainingSAEConfig(d_in=128, d_sae=1024, k=16),
    model_name="demo",
    dataset_path="demo",
    context_size=256,
    store_batch_size_prompts=8,
    training_tokens=training_tokens,
    output_path=output,
)
sae = RouteSAETrainingRunner(config).run()
print(f"routes between blocks {config.routed_blocks}, saved to {output}")
