"""`import sae_lens_route` makes SAELens know the architectures, and is fast.

Each claim is checked in a process of its own, where nothing has been imported.
"""

from importlib.metadata import version

import pytest
import torch
from support.command_line import python

from sae_lens_route.saes import RouteTopKSAE, RouteTopKSAEConfig

CHECKS = """
import importlib, importlib.util, sys

def architectures():
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY as training
    from sae_lens.registry import SAE_CLASS_REGISTRY as inference
    assert "topk" in training  # SAELens's own
    return {"route_topk", "crosscoder", "multi_layer_topk"} <= training.keys() and (
        "route_topk" in inference
    )

def finders():
    return sum(type(finder).__name__ == "_SaeLensFinder" for finder in sys.meta_path)
"""


def check(code: str, *arguments: object) -> None:
    result = python(CHECKS + code, *arguments)
    assert result.returncode == 0, result.stderr


def test_the_import_takes_no_time():
    check("""
import sae_lens_route
assert not {"torch", "sae_lens", "numpy", "transformers"} & sys.modules.keys()
assert finders() == 1
""")


@pytest.mark.parametrize(
    "imports",
    [
        "import sae_lens_route; from sae_lens import SAE",
        "from sae_lens import SAE; import sae_lens_route",
        "import sae_lens_route; import sae_lens.registry",  # a submodule first
        "import sae_lens_route.saes.router",  # a room that itself imports SAELens
        "import sae_lens_route; sae_lens_route.load_model",
    ],
)
def test_any_order_of_imports_registers(imports):
    check(f"{imports}\nassert architectures() and finders() == 0")


def test_sae_lens_is_left_as_it_is_without_the_hook():
    check("""
import sae_lens_route
spec = importlib.util.find_spec("sae_lens")  # to look for it does not import it
assert "sae_lens" not in sys.modules and finders() == 1
import sae_lens
from importlib.machinery import SourceFileLoader
assert type(sae_lens.__loader__) is type(sae_lens.__spec__.loader) is SourceFileLoader
assert finders() == 0 and architectures()
""")


def test_reloads():
    check("""
import sae_lens_route
import sae_lens_route.registration_hook as hook
for _ in range(2):
    importlib.reload(hook)
    importlib.reload(sae_lens_route)
    assert finders() == 1
import sae_lens
assert architectures() and finders() == 0
before = sae_lens.registry.SAE_TRAINING_CLASS_REGISTRY["route_topk"]
importlib.reload(sae_lens_route)
assert architectures() and finders() == 0

# as IPython's autoreload does with files that changed
import sae_lens_route.saes as saes
for name in ("router", "routed", "architectures"):
    importlib.reload(sys.modules[f"sae_lens_route.saes.{name}"])
importlib.reload(saes)
_, config = sae_lens.registry.SAE_TRAINING_CLASS_REGISTRY["route_topk"]
assert config is saes.RouteTopKTrainingSAEConfig is sae_lens_route.RouteTopKTrainingSAEConfig
assert config is not before[1]
""")


@pytest.mark.skipif(
    int(version("beartype").split(".")[1]) < 18, reason="too old to read some annotations"
)
@pytest.mark.parametrize("first", ["sae_lens_route", "sae_lens"])
def test_together_with_jaxtyping_s_import_hook(first):
    check(f"""
from jaxtyping import install_import_hook
with install_import_hook(["sae_lens_route"], "beartype.beartype"):
    import {first}
    import sae_lens_route, sae_lens
    assert architectures() and finders() == 0
    import torch
    from sae_lens_route.saes.router import normalize
    try:
        normalize("text")
    except Exception as error:
        assert "TypeCheck" in type(error).__name__
    else:
        raise AssertionError("not checked")
""")


def test_another_hook_on_the_same_package():
    """Lazy loaders and instrumentation also wrap what the remaining finders find."""
    check("""
from importlib.abc import MetaPathFinder

class Other(MetaPathFinder):
    asked = busy = 0
    def find_spec(self, name, path=None, target=None):
        if name != "sae_lens" or self.busy:
            return None
        self.asked, self.busy = self.asked + 1, 1
        try:
            return importlib.util.find_spec(name)
        finally:
            self.busy = 0

sys.meta_path.insert(0, other := Other())
import sae_lens_route
sys.meta_path.insert(0, later := Other())
import sae_lens
assert other.asked and later.asked and architectures() and finders() == 0
""")


def test_without_sae_lens_its_import_fails_as_ever():
    check("""
import sae_lens_route
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ == "_SaeLensFinder"]
try:
    import sae_lens
except ModuleNotFoundError as error:
    assert error.name == "sae_lens"
else:
    raise AssertionError
""")


def test_threads_that_import_both_do_not_deadlock():
    check("""
import threading
names = ("sae_lens_route", "sae_lens", "sae_lens_route", "sae_lens")
threads = [threading.Thread(target=importlib.import_module, args=(name,)) for name in names]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert architectures() and finders() == 0
""")


def test_a_saved_sae_loads_in_a_fresh_process(tmp_path):
    sae = RouteTopKSAE(RouteTopKSAEConfig(d_in=8, d_sae=16, k=2, n_routed_layers=3))
    sae.save_model(tmp_path)
    x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    torch.save((x, sae.encode_layers(x).detach()), tmp_path / "expected.pt")
    check(
        """
import sae_lens_route
from sae_lens import SAE
import torch
folder = sys.argv[1]
sae = SAE.load_from_disk(folder)
assert type(sae).__name__ == "RouteTopKSAE"
x, expected = torch.load(folder + "/expected.pt")
torch.testing.assert_close(sae.encode_layers(x), expected, rtol=0, atol=0)
""",
        tmp_path,
    )
