"""SAEDashboard's feature pages of a RouteSAE.

1. Extract the plain SAE behind the router (`plain_sae`), whose input is the routed activation.
2. Attach the routed hook and run SAEDashboard at it.
3. Write SAEDashboard's page and make it self-contained: plotly is embedded, and d3 is replaced by
   the few of its functions that the page calls.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from plotly.offline import get_plotlyjs
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAE, TrainingSAE
from torch import Tensor

from sae_lens_route.dashboards.collect import collect
from sae_lens_route.dashboards.page import asset
from sae_lens_route.dashboards.page_data import N_FEATURES
from sae_lens_route.data.kept_tokens import KeptTokens
from sae_lens_route.errors import UserError
from sae_lens_route.models.kinds import LanguageModel, tokenizer_of
from sae_lens_route.saes.routed import RoutedSAEMixin
from sae_lens_route.saes.units import Units, in_units
from sae_lens_route.splice import attach


def plain_sae(sae: RoutedSAEMixin) -> SAE[Any]:
    """The SAE behind the router: the same weights, copied, under the base architecture.

    Its input is the routed activation. Tools that dispatch on the architecture's name know it.

    Raises:
        UserError: `sae` is a training SAE, which may encode differently from the saved SAE.
    """
    if isinstance(sae, TrainingSAE):
        raise UserError(
            f"{type(sae).__name__} is a training SAE: save it with save_inference_model(path) and "
            "load it with SAE.load_from_disk(path)"
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
    sae: RoutedSAEMixin,
    tokens: Int[Tensor, "n pos"],
    path: str | Path,
    *,
    features: Sequence[int] | None = None,
    n_features: int = N_FEATURES,
    units: Units = "n(x)",
) -> Path:
    """Write SAEDashboard's feature pages as one self-contained file; returns its path.

    SAEDashboard runs on a copy of the plain SAE behind the router, so `sae` is unchanged. Tokens
    are excluded as in training.

    Args:
        model: The HookedTransformer `sae` was trained on, with its tokenizer and nothing attached.
        sae: A RouteSAE for inference.
        tokens: Token ids, one sequence per row, at least 12 tokens long.
        path: The HTML file (any other suffix is replaced); its folder is created if missing.
        features: The features to show; None takes the `n_features` to look at first
            (`features/selection.py`).
        n_features: How many to take when `features` is None.
        units: Of the activations (`saes/units.py`).

    Raises:
        UserError: SAEDashboard is not installed, sequences too short, features that the SAE does
            not have, no active feature, or a model without an unembedding.
    """
    save_page = _import_sae_dashboard().data_writing_fns.save_feature_centric_vis
    data = sae_dashboard_data(
        model, sae, tokens, features=features, n_features=n_features, units=units
    )
    path = Path(path).with_suffix(".html")
    path.parent.mkdir(parents=True, exist_ok=True)
    # the first feature has fired: a page that opens on a dead feature stays blank
    save_page(data, path, feature_idx=next(iter(data.feature_data_dict)))
    path.write_text(_self_contained(path.read_text()), encoding="utf-8")
    return path


def sae_dashboard_data(
    model: LanguageModel,
    sae: RoutedSAEMixin,
    tokens: Int[Tensor, "n pos"],
    *,
    features: Sequence[int] | None = None,
    n_features: int = N_FEATURES,
    units: Units = "n(x)",
) -> Any:
    """SAEDashboard's `SaeVisData` of a RouteSAE; arguments as in `sae_dashboard_pages`.

    Features that are never active on these tokens are omitted, and the others are in the order of
    `features/selection.py`.
    """
    dashboard = _import_sae_dashboard()
    tokenizer = tokenizer_of(model)
    if tokens.shape[1] < _MIN_SEQUENCE:
        raise UserError(
            f"sequences of {tokens.shape[1]} tokens: SAEDashboard needs at least {_MIN_SEQUENCE}"
        )
    if not hasattr(model, "W_U"):
        raise UserError(
            f"a {type(model).__name__} has no W_U, from which SAEDashboard computes logits: "
            "load the model with model_class_name='HookedTransformer'"
        )
    collected = collect(model, sae, tokens, features=features, units=units)
    shown = collected.features_to_show(n_features if features is None else len(features))
    kept = KeptTokens.of(sae, tokenizer)
    kept_positions = kept._replace(excluded_ids=()).mask(tokens[:1])[0]
    encoder = plain_sae(sae)
    # SAEDashboard folds the decoder norm into the encoder. SAELens's TopK refuses that, and it
    # would rescale the activations of the others, which are those of unfolded rows.
    encoder.fold_W_dec_norm = lambda: None  # type: ignore[method-assign]
    encode = encoder.encode
    with attach(model, sae) as hook:

        def encode_in_units(x_route: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos n"]:
            # SAEDashboard encodes the activations of each pass right after it
            assert hook.routing is not None
            return in_units(encode(x_route), hook.routing, sae, units)

        encoder.encode = encode_in_units  # type: ignore[method-assign]
        config = dashboard.sae_vis_data.SaeVisConfig(
            hook_point=hook.name,
            features=shown,
            device=str(sae.device),
            ignore_tokens=set(kept.excluded_ids),
            ignore_positions=(~kept_positions).nonzero().flatten().tolist(),
        )
        runner = dashboard.sae_vis_runner.SaeVisRunner(config)
        data = runner.run(encoder=encoder, model=model, tokens=tokens)
    encoder.encode = encode  # `data` keeps the encoder, but the hook has no routing any more
    return data


_MIN_SEQUENCE = 12
"""SAEDashboard always shows 5 tokens on either side of the activated one."""


def _import_sae_dashboard() -> Any:
    """The package, with the modules that are used of it."""
    try:
        import sae_dashboard.data_writing_fns  # type: ignore[import-not-found]
        import sae_dashboard.sae_vis_data  # type: ignore[import-not-found]
        import sae_dashboard.sae_vis_runner  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(
            f"SAEDashboard cannot be imported ({error}): pip install 'sae-lens-route[dashboard]'"
        ) from error
    return sae_dashboard


def _self_contained(page: str) -> str:
    """SAEDashboard's page with its libraries embedded, UTF-8 declared and connections forbidden."""
    for address, script in (
        (r"https://d3js\.org/d3\.v6\.min\.js", asset("d3_selections.js")),
        (r"https://cdn\.plot\.ly/plotly-latest\.min\.js", get_plotlyjs()),
    ):
        tag = rf'<script src="{address}"></script>'
        page, n = re.subn(tag, lambda _, script=script: f"<script>{script}</script>", page)
        if n != 1:
            raise RuntimeError(f"SAEDashboard's page has {n} tags {tag!r} where 1 was expected")
    page, n = re.subn(r"^( *return )(\{.*\});$", _without_markup, page, flags=re.M)
    if n == 0:
        raise RuntimeError("SAEDashboard's page has no line of data")
    return (
        '<!DOCTYPE html>\n<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'\">\n"
        f"<title>RouteSAE features</title>\n{page}"
    )


def _without_markup(line: re.Match[str]) -> str:
    """A line of data in which no text of a token is markup.

    SAEDashboard's script puts tokens into the page as HTML and, elsewhere, as text, so that no way
    to escape them would be right in both: they are shown with look-alikes of `<` and `&`.
    """

    look_alikes = str.maketrans("<&", "\uff1c\uff06")

    def shown(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: shown(each, name) for name, each in value.items()}
        if isinstance(value, list):
            return [shown(each, key) for each in value]
        is_token = isinstance(value, str) and key != "title"  # titles are SAEDashboard's own
        return value.translate(look_alikes) if is_token else value

    data = json.dumps(shown(json.loads(line[2])), separators=(",", ":"))
    return f"{line[1]}{data.replace('<', chr(92) + 'u003c')};"
