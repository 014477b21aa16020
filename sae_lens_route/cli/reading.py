"""Commands that read a saved SAE: `eval`, `features`, `interpret`, `dashboard`, `steer`, `info`."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sae_lens_route.cli.application import app
from sae_lens_route.cli.options import (
    BatchSize,
    Dataset,
    Device,
    Folder,
    JudgeUrl,
    MaxTokens,
    ModelName,
    TrustRemoteCode,
    Units,
    UnitsOfActivations,
)
from sae_lens_route.cli.saved import (
    held_out_text,
    load_routed_sae,
    load_sae,
    read_answers,
    read_feature_table,
    read_scores,
)
from sae_lens_route.errors import UserError

if TYPE_CHECKING:
    from sae_lens_route.features.judge_prompt import Answer


@app.command("eval")
def evaluate_sae(
    path: Annotated[Path, typer.Argument(help="A folder with a saved RouteSAE or crosscoder.")],
    dataset: Dataset = None,
    max_tokens: MaxTokens = 50_000,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    model_name: ModelName = None,
    trust_remote_code: TrustRemoteCode = False,
    output: Annotated[
        Path | None, typer.Option(help="JSON file.", show_default="eval.json in PATH")
    ] = None,
) -> None:
    """Evaluate a RouteSAE or crosscoder: our metrics and SAELens's own `run_evals`, as JSON."""
    from sae_lens_route.evals.evaluate import evaluate, saelens_metrics
    from sae_lens_route.splice.language_model import load_model_of

    sae = load_sae(path, device)
    model = load_model_of(sae, model_name, device, trust_remote_code)
    text = held_out_text(dataset, sae.cfg.metadata.dataset_path)
    ours = evaluate(model, sae, text, max_tokens=max_tokens, batch_size=batch_size)
    theirs = None
    if ours.downstream is not None:
        theirs = saelens_metrics(model, sae, text, max_tokens=max_tokens, batch_size=batch_size)
    output = output or path / "eval.json"
    content = {
        "dataset": text,
        "max_tokens": max_tokens,
        "batch_size": batch_size,
        "ours": ours.to_dict(),
        "saelens": _finite(theirs),
    }
    output.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    typer.echo(f"NormMSE {ours.reconstruction.norm_mse:.4f}, L0 {ours.reconstruction.l0:.1f}")
    spliced = {"": ours.downstream, " unscaled (the paper's code)": ours.downstream_unscaled}
    for name, result in spliced.items():
        if result is not None:
            per_512 = f"{result.kl_per_512_tokens:.1f} per 512 tokens"
            typer.echo(f"KL{name} {result.kl:.4f} nats per token, {per_512}")
    typer.echo(f"wrote {output}")


@app.command()
def features(
    path: Folder,
    dataset: Dataset = None,
    max_tokens: MaxTokens = 1_000_000,
    threshold: Annotated[
        float | None,
        typer.Option(help="Activations above it are contexts.", show_default="0.331 * sqrt(d_in)"),
    ] = None,
    also: Annotated[
        list[float] | None,
        typer.Option(help="Another threshold to count interpretable features at; repeatable."),
    ] = None,
    min_contexts: Annotated[
        int, typer.Option(min=1, help="Contexts that make a feature interpretable.")
    ] = 4,
    reference: Annotated[
        bool, typer.Option("--reference", help="Rules of the paper's code; needs --threshold.")
    ] = False,
    units: Annotated[
        Units | None,
        typer.Option(
            help="Units of activations and thresholds.",
            show_default="n(x), and x_route with --reference",
        ),
    ] = None,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    model_name: ModelName = None,
    trust_remote_code: TrustRemoteCode = False,
    output: Annotated[
        Path | None, typer.Option(help="A new folder.", show_default="`features` in PATH")
    ] = None,
) -> None:
    """Find the features' contexts above a threshold and their block profiles, as parquet."""
    from sae_lens_route.data.reading import activation_batches
    from sae_lens_route.features.contexts import find_contexts
    from sae_lens_route.features.selection import summary
    from sae_lens_route.features.table import ContextOptions
    from sae_lens_route.splice.language_model import load_model_of
    from sae_lens_route.training.checkpoint import require_new_folder

    output = output or path / "features"
    require_new_folder(output, also_holds="features.parquet")
    options = ContextOptions(threshold, tuple(also or ()), min_contexts=min_contexts)
    if reference:
        if threshold is None:
            raise UserError("--reference: give the --threshold too (the paper's is 15 at d 2048)")
        options = ContextOptions.reference(threshold)
    if units is not None:
        options = replace(options, units=units.value)
    sae = load_routed_sae(path, device, "features")
    text = held_out_text(dataset, sae.cfg.metadata.dataset_path)
    model = load_model_of(sae, model_name, device, trust_remote_code)
    batches = activation_batches(
        model, sae, text, max_tokens=max_tokens, batch_size=batch_size, description="reading"
    )
    table = find_contexts(sae, batches, model.tokenizer, options)
    table.to_parquet(output)
    table.to_reference_json(output / "contexts.json")
    typer.echo(summary(table))
    typer.echo(f"wrote {output}")


@app.command()
def interpret(
    path: Annotated[Path, typer.Argument(help="A folder that `features` wrote.")],
    model: Annotated[
        str | None, typer.Option(help="Judge model.", show_default="rank features by surface cues")
    ] = None,
    base_url: JudgeUrl = None,
    n_features: Annotated[int, typer.Option(min=1, help="Features to sample.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    concurrency: Annotated[int, typer.Option(min=1, help="Concurrent requests.")] = 8,
    agreement: Annotated[
        Path | None,
        typer.Option(help="Compare with another judge.jsonl, or a filled-in CSV sheet."),
    ] = None,
) -> None:
    """Score features with a language model as judge (paper 3.4), or rank them without one."""
    from sae_lens_route.features.judge import Judge
    from sae_lens_route.features.judge_results import answers
    from sae_lens_route.features.surface_score import surface_ranking, write_surface_ranking

    table = read_feature_table(path)
    other = None if agreement is None else read_answers(agreement)
    if model is None and other is not None:
        _compare_judges(path, agreement, read_answers(path / "judge.jsonl"), other)
        return
    if model is None:
        output = path / "surface_ranking.json"
        ranking = surface_ranking(table, seed)
        write_surface_ranking(ranking, output)
        typer.echo(f"{len(ranking)} features ranked by surface cues (not the paper's score)")
    else:
        output = path / "judge.jsonl"
        judge = Judge(model, base_url=base_url, concurrency=concurrency)
        run = judge.run(table, output, n_features=n_features, seed=seed)
        typer.echo(json.dumps(run.summary._asdict(), indent=1))
        if other is not None:
            _compare_judges(path, agreement, answers(run.results), other)
    typer.echo(f"wrote {output}")


def _compare_judges(
    folder: Path, other_file: Path | None, first: dict[int, Answer], second: dict[int, Answer]
) -> None:
    from sae_lens_route.features.raters import agreement
    from sae_lens_route.plots import judge_agreement, write_figure

    result = agreement(first, second)
    typer.echo(json.dumps(result._asdict(), indent=1))
    names = "judge.jsonl", str(other_file)
    for path in write_figure(judge_agreement(result, names), folder / "agreement"):
        typer.echo(f"wrote {path}")


class Where(str, Enum):
    """Tokens to steer."""

    prompt = "prompt"
    generated = "generated"
    both = "both"


@app.command()
def steer(
    path: Folder,
    prompt: Annotated[str, typer.Argument(help="Text that the model continues.")],
    edit: Annotated[
        list[str],
        typer.Option(
            help="FEATURE:set|add|scale:VALUE or FEATURE:ablate; repeatable. 17:set:1.5x is 1.5 "
            "times the feature's maximum."
        ),
    ],
    features: Annotated[
        Path | None,
        typer.Option(
            help="A folder that `features` wrote, with the maxima.", show_default="measure them"
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Text to measure maxima on.", show_default="what the SAE was trained on"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to measure maxima on.")] = 20_000,
    units: UnitsOfActivations = Units.stream,
    where: Annotated[Where, typer.Option(help="Tokens to steer.")] = Where.both,
    steer_system: Annotated[
        bool,
        typer.Option(
            "--steer-system",
            help="Also steer what the chat template puts before PROMPT, such as a system prompt.",
        ),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[
        float | None, typer.Option(min=0.01, help="Sampling temperature.", show_default="greedy")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    chat_template: Annotated[bool, typer.Option(help="Use the tokenizer's, if it has one.")] = True,
    device: Device = "cpu",
    model_name: ModelName = None,
    trust_remote_code: TrustRemoteCode = False,
    output: Annotated[Path | None, typer.Option(help="Also write everything as JSON.")] = None,
) -> None:
    """Generate text with features edited, and without."""
    from sae_lens_route.splice.language_model import load_model_of
    from sae_lens_route.steering import FeatureEdit, maxima_of_table, measured_maxima, render
    from sae_lens_route.steering import steer as steer_text

    edits = [FeatureEdit.parse(text) for text in edit]
    table = None if features is None else read_feature_table(features)
    sae = load_routed_sae(path, device, "steer")
    model = load_model_of(sae, model_name, device, trust_remote_code)
    if table is not None:
        maxima = maxima_of_table(table, sae, edits, units.value)
    else:
        maxima = measured_maxima(
            model, sae, edits, dataset, max_tokens=max_tokens, units=units.value
        )
    result = steer_text(
        model,
        sae,
        prompt,
        edits,
        maxima=maxima,
        units=units.value,
        where=where.value,
        steer_system=steer_system,
        max_new_tokens=max_new_tokens,
        do_sample=temperature is not None,
        temperature=temperature or 1.0,
        seed=seed,
        chat_template=chat_template,
    )
    typer.echo(render(result))
    if output is not None:
        output.write_text(json.dumps(result.to_dict(), indent=1) + "\n")
        typer.echo(f"wrote {output}")


@app.command()
def dashboard(
    path: Folder,
    dataset: Dataset = None,
    feature: Annotated[
        list[int] | None,
        typer.Option(help="A feature to show; repeatable.", show_default="those to look at first"),
    ] = None,
    n_features: Annotated[int, typer.Option(min=1, help="How many to choose.")] = 32,
    features: Annotated[
        Path | None,
        typer.Option(
            help="A folder that `features` wrote: shows its contexts, and the scores that "
            "`interpret` wrote there."
        ),
    ] = None,
    max_tokens: MaxTokens = 50_000,
    units: UnitsOfActivations = Units.stream,
    device: Device = "cpu",
    model_name: ModelName = None,
    trust_remote_code: TrustRemoteCode = False,
    output: Annotated[
        Path | None, typer.Option(help="HTML file.", show_default="dashboard.html in PATH")
    ] = None,
) -> None:
    """Write one self-contained page of features: activations, contexts, blocks, routes."""
    from sae_lens_route.dashboards import write_dashboard
    from sae_lens_route.splice.language_model import load_model_of

    table = None if features is None else read_feature_table(features)
    scores = None if features is None else read_scores(features)
    sae = load_routed_sae(path, device, "dashboard")
    output = output or path / "dashboard.html"
    model = load_model_of(sae, model_name, device, trust_remote_code)
    write_dashboard(
        model,
        sae,
        held_out_text(dataset, sae.cfg.metadata.dataset_path),
        output,
        features=feature or None,
        n_features=n_features,
        judge_scores=scores,
        feature_table=table,
        max_tokens=max_tokens,
        units=units.value,
    )
    typer.echo(f"wrote {output}")


@app.command()
def info(path: Annotated[Path, typer.Argument(help="A folder with a saved SAE.")]) -> None:
    """Check a saved SAE; print its configuration, metadata and shapes of weights, as JSON."""
    from sae_lens_route.saes.saved import describe_saved_sae

    typer.echo(json.dumps(describe_saved_sae(path), indent=1))


def _finite(value: Any) -> Any:
    """NaN as null: SAELens divides by how often a feature fired, which can be never."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
