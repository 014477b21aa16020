"""SAEDashboard's feature pages of a RouteSAE.

`sae_dashboard_pages` writes SAEDashboard's page for the plain SAE behind the router, run at the
routed hook, and makes that page self-contained.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Int
from plotly.offline import get_plotlyjs
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAE, TrainingSAE
from torch import Tensor

from sae_lens_route.dashboards import (
    N_FEATURES,
    check_features,
    collect_activations,
    page_file,
    passed_over_ids,
    strongest_features,
    tensor_batches,
    tokenizer_of,
)
from sae_lens_route.models import LanguageModel
from sae_lens_route.saes import RoutedSAE
from sae_lens_route.splice import attach


def plain_sae(sae: RoutedSAE) -> SAE[Any]:
    """The SAE behind the router: the same weights, copied, under the base architecture.

    It is what tools know that ask for an architecture by name; its input is the routed activation.

    Raises:
        ValueError: `sae` is one for training, which may not encode as the saved one does.
    """
    if isinstance(sae, TrainingSAE):
        raise ValueError(
            "a training SAE: save_inference_model(path), then SAE.load_from_disk(path)"
        )
    sae_class, config_class = get_sae_class(sae.cfg.architecture().removeprefix("route_"))
    names = {field.name for field in fields(config_class) if field.init}
    config = config_class(**{name: copy.deepcopy(getattr(sae.cfg, name)) for name in names})
    plain = sae_class(config)
    weights = {k: v.clone() for k, v in sae.state_dict().items() if not k.endswith("_router")}
    plain.load_state_dict(weights)
    return plain.to(device=sae.device, dtype=sae.dtype).eval()


def sae_dashboard_pages(
    model: LanguageModel,
    sae: RoutedSAE,
    tokens: Int[Tensor, "n pos"],
    path: str | Path,
    *,
    features: Sequence[int] | None = None,
    n_features: int = N_FEATURES,
) -> Path:
    """Write SAEDashboard's feature pages as one self-contained file; gives back its path.

    SAEDashboard runs on a copy of the plain SAE behind the router, so `sae` stays as it is, and
    encodes what passes through the routed hook. Special tokens are passed over as in our own page.
    The file needs no network: plotly is in it, and in place of d3 the few of its functions the
    page calls.

    Args:
        model: a HookedTransformer `sae` was trained on, with its tokenizer and nothing attached.
        sae: a RouteSAE for inference.
        tokens: token ids, one sequence per row, at least 12 tokens long.
        path: the HTML file, with this suffix in any case; its folder is made if missing.
        features: which ones; None takes the `n_features` largest maximum activations.
        n_features: how many to take when `features` is None.

    Raises:
        ImportError: SAEDashboard is not installed.
        ValueError: sequences too short, features the SAE does not have or none that is active, or
            a model without an unembedding.
    """
    save_page = _import_sae_dashboard().save_feature_centric_vis
    data = sae_dashboard_data(model, sae, tokens, features=features, n_features=n_features)
    path = Path(path).with_suffix(".html")
    path.parent.mkdir(parents=True, exist_ok=True)
    # the first feature is the strongest: a page that opens on a dead one stays blank
    save_page(data, path, feature_idx=next(iter(data.feature_data_dict)))
    path.write_text(_self_contained(path.read_text()), encoding="utf-8")
    return path


def sae_dashboard_data(
    model: LanguageModel,
    sae: RoutedSAE,
    tokens: Int[Tensor, "n pos"],
    *,
    features: Sequence[int] | None = None,
    n_features: int = N_FEATURES,
) -> Any:
    """SAEDashboard's `SaeVisData` of a RouteSAE; arguments as in `sae_dashboard_pages`.

    Features that are never active on these tokens are left out; the strongest comes first.
    """
    dashboard = _import_sae_dashboard()
    tokenizer = tokenizer_of(model)
    if tokens.shape[1] < _MIN_SEQUENCE:
        raise ValueError(
            f"sequences of {tokens.shape[1]} tokens: SAEDashboard needs at least {_MIN_SEQUENCE}"
        )
    if not hasattr(model, "W_U"):
        raise ValueError(
            f"a {type(model).__name__} has no W_U, which SAEDashboard reads the logits from: load "
            "the model with model_class_name='HookedTransformer'"
        )
    check_features(features, sae.cfg.d_sae)
    passed_over = passed_over_ids(sae, tokenizer)
    seen = collect_activations(model, sae, tensor_batches(tokens, 0), passed_over, features)
    chosen = strongest_features(seen, n_features if features is None else len(features))
    encoder = plain_sae(sae)
    # SAEDashboard folds the decoder norm into the encoder, which SAELens's TopK refuses and which
    # would rescale the activations of others: they are shown as `sae.encode` gives them
    encoder.fold_W_dec_norm = lambda: None  # type: ignore[method-assign]
    with attach(model, sae) as hook:
        config = dashboard.SaeVisConfig(
            hook_point=hook.name,
            features=chosen,
            device=str(sae.device),
            ignore_tokens=set(passed_over.tolist()),
        )
        return dashboard.SaeVisRunner(config).run(encoder=encoder, model=model, tokens=tokens)


_MIN_SEQUENCE = 12
"""SAEDashboard shows 5 tokens on either side of the activated one, and never less."""


class _SaeDashboard(NamedTuple):
    SaeVisConfig: Any
    SaeVisRunner: Any
    save_feature_centric_vis: Any


def _import_sae_dashboard() -> _SaeDashboard:
    try:
        from sae_dashboard.data_writing_fns import (  # type: ignore[import-not-found]
            save_feature_centric_vis,
        )
        from sae_dashboard.sae_vis_data import SaeVisConfig  # type: ignore[import-not-found]
        from sae_dashboard.sae_vis_runner import SaeVisRunner  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError(
            f"SAEDashboard cannot be imported ({error}): pip install 'sae-lens-route[dashboard]'"
        ) from error
    return _SaeDashboard(SaeVisConfig, SaeVisRunner, save_feature_centric_vis)


def _self_contained(page: str) -> str:
    """SAEDashboard's page with its libraries in it, its encoding named, connections forbidden."""
    for address, script in (
        (r"https://d3js\.org/d3\.v6\.min\.js", page_file("d3_selections.js")),
        (r"https://cdn\.plot\.ly/plotly-latest\.min\.js", get_plotlyjs()),
    ):
        tag = rf'<script src="{address}"></script>'
        page, n = re.subn(tag, lambda _, script=script: f"<script>{script}</script>", page)
        if n != 1:
            raise RuntimeError(f"SAEDashboard's page has {n} tags {tag!r} where 1 was expected")
    # a token may be spelled </script>
    page = re.sub(
        r"^ *return \{.*\};$", lambda line: line[0].replace("<", "\\u003c"), page, flags=re.M
    )
    return (
        '<!DOCTYPE html>\n<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        f'img-src data: blob:">\n<title>RouteSAE features</title>\n{page}'
    )
