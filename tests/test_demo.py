"""The demo, end to end at a small size, and the language model it ships."""

import json

import pytest
import torch
from sae_lens import SAE

from sae_lens_route.data.demo_corpus import documents
from sae_lens_route.demo import run_demo
from sae_lens_route.models.load import load_model
from sae_lens_route.models.names import DEMO_FOLDER


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "out"
    return run_demo(output, training_tokens=40_960, eval_tokens=2_048), output


def test_writes_everything_it_names(demo):
    report, output = demo
    assert json.loads((output / "report.json").read_text()) == report
    assert all((output / name).stat().st_size > 0 for name in report["figures"])
    for router, objective in (("paper", "reconstruction"), ("assignment", "assignment")):
        sae = SAE.load_from_disk(output / router)
        assert sae.cfg.scale_by_probability == (router == "paper")
        trained = json.loads((output / router / "runner_cfg.json").read_text())["sae"]
        assert trained["router_objective"] == objective
        held_out = report["held_out"][router]
        metrics = held_out["reconstruction"]
        assert sum(metrics["share_by_block"].values()) == pytest.approx(1)
        assert list(metrics["share_by_block"]) == [str(i) for i in range(3, 12)]
        assert metrics["l0"] <= 16 and 0 < metrics["norm_mse"] < 1
        assert held_out["downstream"]["kl"] > 0 and held_out["downstream_unscaled"]["kl"] > 0


def test_both_routers_are_drawn(demo):
    _, output = demo
    for name in ("routing_weights", "training"):
        drawn = (output / f"{name}.svg").read_text()
        assert "paper" in drawn and "assignment" in drawn


def test_figures_need_no_network(demo):
    _, output = demo
    page = (output / "routing_weights.html").read_text()
    assert 'src="http' not in page and "Plotly.newPlot" in page
    assert "<svg" in (output / "routing_weights.svg").read_text()


def test_is_not_written_over(demo):
    with pytest.raises(ValueError, match="already holds a run"):
        run_demo(demo[1])


def test_the_shipped_model_is_what_its_card_says():
    """Bits per byte on the held-out modules, far below the simple models of the same text."""
    info = json.loads((DEMO_FOLDER / "INFO.json").read_text())
    assert (
        info["bits_per_byte"] < 1.5 < info["bits_per_byte_xz"] < info["bits_per_byte_ngram_order5"]
    )
    assert (DEMO_FOLDER / "model.safetensors").stat().st_size < 8e6

    model = load_model("demo")
    text = "".join(documents("heldout"))[:20_000]
    tokens = model.to_tokens(text, prepend_bos=False, truncate=False)[0]
    windows = tokens[: len(tokens) // 255 * 255].view(-1, 255)
    bos = torch.zeros(len(windows), 1, dtype=torch.long)
    with torch.no_grad():
        nats = model(torch.cat([bos, windows], dim=1), return_type="loss") * windows.numel()
    n_bytes = len(model.tokenizer.decode(windows.flatten()).encode())
    bits = float(nats) / torch.log(torch.tensor(2.0)) / n_bytes
    # a sample of 20,000 characters, so only roughly the whole's
    assert bits == pytest.approx(info["bits_per_byte"], rel=0.35)
