"""Training runs that are killed with SIGKILL, and the checkpoints they leave."""

import os
import subprocess
import sys

PRELUDE = """
import os, signal, sys, torch
from pathlib import Path
import sae_lens_route.training.runner as module
torch.set_num_threads(1)
folder, last = Path(sys.argv[1]), int(sys.argv[2])
batches = module.RouteSAETrainingRunner._stream
def dying(self):
    for n, batch in enumerate(batches(self)):
        if n == last:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
module.RouteSAETrainingRunner._stream = dying
resume = str(folder) if (folder / "latest").exists() else None
"""


def killed_at(code, folder, *steps):
    """Run a program that kills itself with SIGKILL while the batch of a step is being made."""
    path = os.pathsep.join(filter(None, sys.path))  # the package and the tests of this process
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    for step in steps:
        command = [sys.executable, "-c", f"{PRELUDE}{code}", str(folder), str(step)]
        # elsewhere, because a program finds what is in its working folder first
        options = {"env": environment, "cwd": folder.parent}
        done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
        assert done.returncode == -9, done.stderr


def checkpoints_of(folder):
    """The checkpoints of a run, the oldest first."""
    return sorted((folder / "checkpoints").glob("*/*"), key=lambda path: int(path.name))
