"""Commands that train: `train`, `sweep`, `demo` and `reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sae_lens_route.cli.application import app, print_table
from sae_lens_route.cli.field_options import FieldCommand, given_fields
from sae_lens_route.cli.options import Dataset, EvalTokens, JudgeUrl
from sae_lens_route.cli.saved import held_out_text
from sae_lens_route.errors import UserError

if TYPE_CHECKING:
    from sae_lens_route.config import RouteSAERunnerConfig
    from sae_lens_route.evals.comparison import SweepRow
    from sae_lens_route.training.sweep import SweepRunner


@app.command(cls=FieldCommand)
def train(
    config: Annotated[
        Path | None, typer.Option(help="YAML or JSON file with fields; options override it.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Folder of a run: continue from its newest checkpoint, as configured."),
    ] = None,
    extend: Annotated[
        int | None,
        typer.Option(help="With --resume: train up to so many tokens, more than the run had."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the resolved run, its memory and its steps; exit."),
    ] = False,
) -> None:
    """Train a RouteSAE or a crosscoder on a language model's activations."""
    import yaml

    from sae_lens_route.config import runner_config
    from sae_lens_route.config_fields import read_config_file
    from sae_lens_route.training.resume import resumed_config
    from sae_lens_route.training.runner import RouteSAETrainingRunner

    if resume is None:
        if extend is not None:
            raise UserError(f"--extend={extend}: name the folder of the run with --resume")
        cfg = runner_config({**(read_config_file(config) if config else {}), **given_fields()})
    elif config is not None:
        raise UserError(f"--config={str(config)!r}: --resume takes the run's own configuration")
    else:
        cfg = resumed_config(resume, given_fields(), extend)
    runner = RouteSAETrainingRunner(cfg)
    if dry_run:
        typer.echo(yaml.safe_dump(cfg.to_dict(), sort_keys=False))
        _print_plan(cfg, cfg.memory_estimate())
        return
    runner.run()
    typer.echo(f"wrote {cfg.output_path}")


@app.command(cls=FieldCommand)
def cache(
    config: Annotated[
        Path | None, typer.Option(help="A run as `train --config` takes it; options override it.")
    ] = None,
) -> None:
    """Write the activations of a run to --cache-activations, for runs that train on them."""
    from sae_lens_route.config import runner_config
    from sae_lens_route.config_fields import read_config_file
    from sae_lens_route.data.activation_cache import write_cache
    from sae_lens_route.training.runner import load_model_of_run

    fields = {**(read_config_file(config) if config else {}), **given_fields()}
    for name in ("runs", "seeds"):  # of a sweep, which reads the same
        fields.pop(name, None)
    cfg = runner_config(fields)
    if cfg.cache_activations is None:
        raise UserError("--cache-activations: name a folder for the activations")
    written = write_cache(cfg, load_model_of_run(cfg)).manifest
    typer.echo(
        f"wrote {written.n_rows:,} tokens x {len(written.blocks)} blocks, "
        f"{written.n_rows * written.row_bytes / 1e9:.2f} GB, to {cfg.cache_activations}"
    )


def _print_plan(cfg: RouteSAERunnerConfig, memory: dict[str, int]) -> None:
    typer.echo(
        f"steps: {cfg.total_training_steps:,} of {cfg.step_tokens:,} tokens "
        f"({cfg.lr_warm_up_steps:,} warm-up, {cfg.lr_decay_steps:,} decay)"
    )
    typer.echo("memory, excluding the language model:")
    for name, n_bytes in memory.items():
        typer.echo(f"  {name:15} {n_bytes / 1e9:8.3f} GB")
    typer.echo(f"  {'total':15} {sum(memory.values()) / 1e9:8.3f} GB on {cfg.device}")


@app.command()
def sweep(
    config: Annotated[
        Path,
        typer.Option(help="YAML or JSON file: fields as for `train`, and `runs` and `seeds`."),
    ],
    output_path: Annotated[Path | None, typer.Option(help="Overrides the file's.")] = None,
    device: Annotated[str | None, typer.Option(help="Overrides the file's.")] = None,
    dataset: Dataset = None,
    eval_tokens: EvalTokens = 50_000,
    resume_from_checkpoint: Annotated[
        Path | None, typer.Option(help="Resume from this checkpoint of the sweep.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the dictionaries, memory and steps; exit.")
    ] = False,
) -> None:
    """Train many dictionaries on one stream of activations, and compare them on held-out text."""
    from sae_lens_route.config_sweep import sweep_config
    from sae_lens_route.data.text import load_text_dataset
    from sae_lens_route.evals.comparison import evaluate_sweep
    from sae_lens_route.plots import TradeoffPoint, tradeoff, write_figure
    from sae_lens_route.training.entries import expand_runs
    from sae_lens_route.training.sweep import SweepRunner

    given = {
        "output_path": output_path,
        "device": device,
        "resume_from_checkpoint": resume_from_checkpoint,
    }
    cfg, runs, seeds = sweep_config(config, **{k: v for k, v in given.items() if v is not None})
    entries = expand_runs(runs, cfg.d_model, seeds)
    text = held_out_text(dataset, cfg.dataset_path)
    load_text_dataset(text)  # its errors belong before the training, not after
    runner = SweepRunner(cfg, entries)
    if dry_run:
        _print_dictionaries(runner)
        _print_plan(cfg, runner.memory_estimate())
        return
    saes = runner.run()
    result = evaluate_sweep(runner.model, entries, saes, text, max_tokens=eval_tokens)
    folder = Path(cfg.output_path or "")
    written = result.write(folder)
    errors = [TradeoffPoint.of(row, row.norm_mse) for row in result.rows]
    written += write_figure(tradeoff(errors, "NormMSE"), folder / "norm_mse_by_l0")
    divergences = [TradeoffPoint.of(row, row.kl) for row in result.rows if row.kl is not None]
    if divergences:
        written += write_figure(tradeoff(divergences, "KL, nats per token"), folder / "kl_by_l0")
    print_table(
        ["", "parameters", "L0", "NormMSE", "KL", "dead", "dense"],
        [_cells(row) for row in result.rows],
    )
    typer.echo('KL in nats per token; "-" where there is no one block to splice into')
    typer.echo(f"wrote {len(entries)} dictionaries, each to its folder in {folder}")
    for path in written:
        typer.echo(f"wrote {path}")


def _cells(row: SweepRow) -> list[object]:
    return [
        row.name,
        f"{row.n_parameters:,}",
        f"{row.l0:.1f}",
        f"{row.norm_mse:.4f}",
        "-" if row.kl is None else f"{row.kl:.4f}",
        row.reconstruction.dead_features,
        "-" if row.reconstruction.dense_features is None else row.reconstruction.dense_features,
    ]


def _print_dictionaries(runner: SweepRunner) -> None:
    from sae_lens_route.saes.kinds import SPARSITY_FIELDS

    def sparsity(cfg: Any) -> str:
        given = {name: getattr(cfg, name, None) for name in SPARSITY_FIELDS}
        return " ".join(f"{name}={value}" for name, value in given.items() if value is not None)

    print_table(
        ["", "architecture", "sparsity", "d_sae", "blocks", "seed", "parameters"],
        [
            [
                name,
                sae.cfg.architecture(),
                sparsity(sae.cfg),
                f"{sae.cfg.d_sae:,}",
                " ".join(map(str, sae.cfg.metadata.routed_blocks)),
                runner.entries[name].seed,
                f"{sum(p.numel() for p in sae.parameters()):,}",
            ]
            for name, sae in runner.saes.items()
        ],
    )


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="A new folder.")] = Path("demo-output"),
    training_tokens: Annotated[int, typer.Option(min=10_000)] = 500_000,
    eval_tokens: Annotated[int, typer.Option(min=1_000)] = 30_000,
    seed: Annotated[int, typer.Option(help="Seed of the SAEs' weights.")] = 42,
) -> None:
    """Train two RouteSAEs of the embedded language model, without downloads, and compare them."""
    from sae_lens_route.demo import run_demo

    report = run_demo(output, training_tokens=training_tokens, eval_tokens=eval_tokens, seed=seed)
    rebuilt = {name: each["reconstruction"] for name, each in report["held_out"].items()}
    rows = [
        [
            name,
            f"{metrics['norm_mse']:.4f}",
            f"{report['held_out'][name]['downstream']['kl']:.4f}",
            f"{report['held_out'][name]['downstream']['loss_recovered']:.3f}",
            metrics["dead_features"],
            metrics["dense_features"],
            *(f"{share:.0%}" for share in metrics["share_by_block"].values()),
        ]
        for name, metrics in rebuilt.items()
    ]
    blocks = next(iter(rebuilt.values()))["share_by_block"]
    header = ["router", "NormMSE", "KL", "loss recovered", "dead", "dense"]
    print_table([*header, *(f"block {block}" for block in blocks)], rows)
    typer.echo(
        f"held-out text; KL in nats per token; {report['training_tokens']:,} tokens at "
        f"{report['tokens_per_second']:,.0f} a second, {report['seconds']:.0f} s in all"
    )
    for name in [*(f"{router}/" for router in rebuilt), "report.json", *report["figures"]]:
        typer.echo(f"wrote {output / name}")


@app.command()
def reproduce(
    output: Annotated[
        Path, typer.Option(help="Folder; finished stages in it are not run again.")
    ] = Path("reproduction"),
    config: Annotated[
        Path | None,
        typer.Option(help="A run as `train --config` takes it.", show_default="the demo's"),
    ] = None,
    k: Annotated[int | None, typer.Option(min=1, help="Sparsity of the main comparison.")] = None,
    other_k: Annotated[
        list[int] | None, typer.Option(help="Another sparsity for the trade-off; repeatable.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the main comparison.")] = 3,
    without: Annotated[
        list[str] | None, typer.Option(help="A method to leave out, by its label; repeatable.")
    ] = None,
    training_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of each dictionary.", show_default="the configuration's"),
    ] = None,
    dataset: Dataset = None,
    eval_tokens: EvalTokens = 20_000,
    feature_tokens: Annotated[
        int, typer.Option(min=1, help="Held-out tokens to find contexts in.")
    ] = 30_000,
    search_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of each run that looks for the penalty of a method without k.",
            show_default="the training tokens",
        ),
    ] = None,
    read_share: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Threshold on activations, as a share of sqrt(d_in).",
            show_default="0.331, the paper's 15; 0.2 for the demo",
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="GB that the dictionaries trained at a time may take.",
            show_default="three quarters of what is free",
        ),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="Judge model.", show_default="only the surface score")
    ] = None,
    base_url: JudgeUrl = None,
    page: Annotated[
        Path | None, typer.Option(help="Markdown file whose marked tables are rewritten.")
    ] = None,
) -> None:
    """The paper's tables and figures: every method trained on one stream and evaluated equally."""
    from sae_lens_route.config import RouteSAERunnerConfig
    from sae_lens_route.demo import demo_config
    from sae_lens_route.paper.methods import (
        DEMO_K,
        DEMO_OTHER_KS,
        DEMO_READ_SHARE,
        DEMO_TOKENS,
    )
    from sae_lens_route.paper.plan import PAPER_SHARE
    from sae_lens_route.paper.reproduction import Reproduction, reproduce

    if page is not None and not page.exists():
        raise UserError(f"--page={str(page)!r}: no such file")
    if config is None:
        cfg = demo_config(output, training_tokens=training_tokens or DEMO_TOKENS)
        k, other_k = k or DEMO_K, list(DEMO_OTHER_KS) if other_k is None else other_k
        read_share = DEMO_READ_SHARE if read_share is None else read_share
    else:
        tokens = {} if training_tokens is None else {"training_tokens": training_tokens}
        cfg = RouteSAERunnerConfig.from_file(config, **tokens)
        k = k or getattr(cfg.sae, "k", None)
        if k is None:
            raise UserError("--k: give the sparsity of the main comparison")
    settings = Reproduction(
        cfg=cfg,
        k=k,
        other_ks=tuple(other_k or ()),
        seeds=tuple(range(seeds)),
        eval_dataset=held_out_text(dataset, cfg.dataset_path),
        eval_tokens=eval_tokens,
        feature_tokens=feature_tokens,
        output=output,
        without=tuple(without or ()),
        search_tokens=search_tokens,
        read_share=PAPER_SHARE if read_share is None else read_share,
        memory=None if memory is None else int(memory * 1e9),
        judge=judge,
        base_url=base_url,
    )
    result = reproduce(settings, page=page)
    typer.echo(f"{len(result.trained)} dictionaries in {result.seconds / 60:.0f} minutes")
    typer.echo(f"wrote {output}" + ("" if page is None else f" and the tables of {page}"))
