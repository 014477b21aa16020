"""The command `sae-lens-route`.

Every mistake a user can make ends in one line on standard error and exit code 2, before any long
work where it can be known.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
import yaml
from sae_lens.config import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.training._interruption import InterruptedException

app = typer.Typer(
    help="Train, evaluate and understand RouteSAEs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, FileNotFoundError, ImportError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error
    except (KeyboardInterrupt, InterruptedException) as error:
        typer.echo("stopped", err=True)
        raise typer.Exit(130) from error


# --- train -------------------------------------------------------------------------------------

_FILLED_IN = {"sae", "logger", "hook_name", "hook_eval", "sae_lens_version"}
_FILLED_IN |= {"sae_lens_training_version", "metadata", "n_routed_layers"}


@dataclasses.dataclass(frozen=True)
class _Option:
    """One configuration field as a command-line option and a key of the configuration file."""

    field: str
    owner: str
    """Which part of the configuration it belongs to: "runner", "sae" or "logger"."""
    type_name: str
    default: Any
    help: str


def _documented_arguments(cls: type) -> dict[str, str]:
    """Field texts from the `Args:` sections of a dataclass and its bases, the nearest first."""
    texts: dict[str, str] = {}
    for base in cls.__mro__:
        doc = inspect.cleandoc(base.__doc__ or "")
        _, _, section = doc.partition("Args:\n")
        for match in re.finditer(
            r"^ {4}(\w+)(?: \([^\n]*?\))?: (.*?)(?=^ {4}\w|\Z)", section, re.S | re.M
        ):
            texts.setdefault(match[1], " ".join(match[2].split()))
    return texts


def _options() -> dict[str, _Option]:
    from sae_lens_route.runner import RouteSAERunnerConfig

    architecture = _Option(
        "architecture", "sae", "str", "route_topk", f"one of {', '.join(_architectures())}"
    )
    options: dict[str, _Option] = {"architecture": architecture}
    parts: list[tuple[str, type]] = [
        ("runner", RouteSAERunnerConfig),
        *(("sae", config) for config in _architectures().values()),
        ("logger", LoggingConfig),
    ]
    for owner, cls in parts:
        for option in _options_of(cls, owner):
            options.setdefault(option.field, option)  # device and dtype: both's, so the runner's
    return options


def _architectures() -> dict[str, type]:
    """Training configurations of the routed architectures, the paper's first."""
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    from sae_lens_route.saes import RoutedTrainingConfig

    return {
        name: config
        for name, (_, config) in SAE_TRAINING_CLASS_REGISTRY.items()
        if issubclass(config, RoutedTrainingConfig)
    }


def _options_of(cls: type, owner: str) -> Iterator[_Option]:
    texts = _documented_arguments(cls)
    for field in dataclasses.fields(cls):
        if field.name in _FILLED_IN:
            continue
        default = None if field.default is dataclasses.MISSING else field.default
        written = field.type.__name__ if isinstance(field.type, type) else str(field.type)
        type_name = re.sub(r"typing\.|\s*\| None", "", written)
        yield _Option(field.name, owner, type_name, default, texts.get(field.name, ""))


def _train_signature(function: Callable[..., None]) -> Callable[..., None]:
    """Give `function(**values)` one option per configuration field."""
    parameters = []
    for name, option in _options().items():
        text = option.help
        if option.default is not None:
            text = f"{text} [default: {option.default}]"
        annotation = Annotated[
            str | None,
            typer.Option(
                f"--{name.replace('_', '-')}",
                metavar=option.type_name.upper()[:24],
                help=text.strip(),
                show_default=False,
                rich_help_panel={"runner": "Run", "sae": "RouteSAE", "logger": "W&B"}[option.owner],
            ),
        ]
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
            )
        )
    own = [p for p in inspect.signature(function).parameters.values() if p.kind != p.VAR_KEYWORD]
    hints = get_type_hints(function, include_extras=True)
    own = [p.replace(annotation=hints[p.name]) for p in own]
    function.__signature__ = inspect.Signature([*own, *parameters])  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in [*own, *parameters]}
    return function


def _parse(option: _Option, text: str) -> Any:
    """A value as YAML reads it, so that lists, numbers, booleans and null are written plainly."""
    if option.type_name == "str":
        return None if text in ("null", "none", "None") else text
    if option.field in ("routed_layers", "blocks") and (span := re.fullmatch(r"(\d+)-(\d+)", text)):
        return list(range(int(span[1]), int(span[2]) + 1))
    value = yaml.safe_load(text)
    if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+e[-+]?\d+", text):
        value = float(text)  # YAML 1.1 reads 5e-4 as text
    return value


def _checked(option: _Option, value: Any) -> Any:
    """The value as the field's type, or a ValueError that names field and value."""
    wanted = option.type_name
    simple = {"int": int, "float": float, "bool": bool, "str": str}
    kind = simple.get(wanted)
    if value is None or kind is None:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{option.field}={value!r}: must be {wanted}")
    return value


def runner_config(values: dict[str, Any]) -> Any:
    """A `RouteSAERunnerConfig` from flat field values; what is not given has its default.

    `d_in` and `d_sae` may be left out: they are then the model's width and eight times that.

    Raises:
        ValueError: an unknown field, or a value its field does not take.
    """
    from sae_lens_route.models import model_width
    from sae_lens_route.runner import RouteSAERunnerConfig

    options = _options()
    if unknown := [name for name in values if name not in options]:
        raise ValueError(f"unknown field {unknown[0]!r}: `sae-lens-route train --help` lists them")
    parts: dict[str, dict[str, Any]] = {"runner": {}, "sae": {}, "logger": {"log_to_wandb": False}}
    for name, value in values.items():
        parts[options[name].owner][name] = _checked(options[name], value)
    for shared in ("device", "dtype"):
        if shared in parts["runner"]:
            parts["sae"][shared] = parts["runner"][shared]
    if "d_in" not in parts["sae"]:
        name = parts["runner"].get("model_name", RouteSAERunnerConfig.model_name)
        kind = parts["runner"].get("model_class_name", RouteSAERunnerConfig.model_class_name)
        parts["sae"]["d_in"] = model_width(name, kind)
    parts["sae"].setdefault("d_sae", 8 * parts["sae"]["d_in"])
    architecture = parts["sae"].pop("architecture", "route_topk")
    if architecture not in _architectures():
        choices = ", ".join(_architectures())
        raise ValueError(f"architecture={architecture!r}: must be one of {choices}")
    config = _architectures()[architecture]
    known = {field.name for field in dataclasses.fields(config)}
    if foreign := [name for name in parts["sae"] if name not in known]:
        raise ValueError(f"{foreign[0]}: architecture={architecture!r} has no such field")
    return RouteSAERunnerConfig(
        sae=config(**parts["sae"]),
        logger=LoggingConfig(**parts["logger"]),
        **parts["runner"],
    )


def _read_config_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    if not path.exists():
        raise ValueError(f"--config={str(path)!r}: no such file")
    try:
        content = yaml.safe_load(path.read_text())  # JSON is YAML
    except yaml.YAMLError as error:
        raise ValueError(f"--config={str(path)!r}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config={str(path)!r}: must hold fields and values")
    options = _options()
    return {
        name: _parse(options[name], value) if isinstance(value, str) and name in options else value
        for name, value in content.items()
    }


@app.command()
@_train_signature
def train(
    config: Annotated[
        Path | None, typer.Option(help="YAML or JSON file with fields; options go before it.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved run, its memory and steps; stop.")
    ] = False,
    **values: str | None,
) -> None:
    """Train a RouteSAE on a language model's activations."""
    with _one_line_errors():
        options = _options()
        given = {name: _parse(options[name], text) for name, text in values.items() if text}
        cfg = runner_config({**_read_config_file(config), **given})
        from sae_lens_route.runner import RouteSAETrainingRunner

        runner = RouteSAETrainingRunner(cfg)
        if dry_run:
            typer.echo(yaml.safe_dump(cfg.to_dict(), sort_keys=False))
            _print_plan(cfg, cfg.memory_estimate())
            return
        runner.run()
        typer.echo(f"wrote {cfg.output_path}")


def _print_plan(cfg: LanguageModelSAERunnerConfig[Any], memory: dict[str, int]) -> None:
    typer.echo(
        f"steps: {cfg.total_training_steps:,} of {cfg.train_batch_size_tokens:,} tokens "
        f"({cfg.lr_warm_up_steps:,} warm-up, {cfg.lr_decay_steps:,} decay)"
    )
    typer.echo("memory beside the language model:")
    for name, n_bytes in memory.items():
        typer.echo(f"  {name:15} {n_bytes / 1e9:8.3f} GB")
    typer.echo(f"  {'total':15} {sum(memory.values()) / 1e9:8.3f} GB on {cfg.device}")


# --- sweep -------------------------------------------------------------------------------------


@app.command()
def sweep(
    config: Annotated[
        Path,
        typer.Option(help="YAML or JSON file: fields as for `train`, and `runs` and `seeds`."),
    ],
    output_path: Annotated[Path | None, typer.Option(help="Goes before the file's.")] = None,
    device: Annotated[str | None, typer.Option(help="Goes before the file's.")] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Held-out text; by default the demo corpus's, for the demo corpus."),
    ] = None,
    eval_tokens: Annotated[int, typer.Option(min=1, help="Held-out tokens to read.")] = 50_000,
    resume_from_checkpoint: Annotated[
        Path | None, typer.Option(help="Go on from this checkpoint of the sweep.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the dictionaries, memory and steps; stop.")
    ] = False,
) -> None:
    """Train many dictionaries on one stream of activations, and compare them on held-out text."""
    with _one_line_errors():
        from sae_lens_route.activations import load_text_dataset
        from sae_lens_route.plots import tradeoff, write_figure
        from sae_lens_route.sweep import SweepRunner, evaluate_sweep, expand_runs

        content = _read_config_file(config)
        given = {
            "output_path": output_path,
            "device": device,
            "resume_from_checkpoint": resume_from_checkpoint,
        }
        content |= {name: str(value) for name, value in given.items() if value is not None}
        runs, seeds = content.pop("runs", None), content.pop("seeds", None)
        cfg = runner_config(content)
        if cfg.output_path is None:
            raise ValueError("output_path: name a folder for the dictionaries and the table")
        if not isinstance(runs, dict) or not runs:
            raise ValueError("runs: name at least one dictionary to train, as `LABEL: {k: 16}`")
        seeds = [cfg.seed] if seeds is None else seeds
        if not isinstance(seeds, list) or any(type(seed) is not int for seed in seeds):
            raise ValueError(f"seeds={seeds!r}: must be a list of int")
        settings = {
            str(label): _run_settings(label, run, content, cfg) for label, run in runs.items()
        }
        entries = expand_runs(settings, cfg.sae.d_in, seeds)
        text = dataset or _held_out_text(cfg.dataset_path)
        load_text_dataset(text)  # a mistake there ends in its error now, not after training
        runner = SweepRunner(cfg, entries)
        if dry_run:
            _print_sweep(runner)
            _print_plan(cfg, runner.memory_estimate())
            return
        saes = runner.run()
        result = evaluate_sweep(runner.model, entries, saes, text, max_tokens=eval_tokens)
        folder = Path(cfg.output_path)
        written = result.write(folder)
        for metric in ("norm_mse", "kl"):
            if any(row.get(metric) is not None for row in result.rows):
                written += write_figure(tradeoff(result.rows, metric), folder / f"{metric}_by_l0")
        _print_rows(
            ["", "parameters", "L0", "NormMSE", "KL", "dead"],
            [
                [
                    row["name"],
                    f"{row['n_parameters']:,}",
                    f"{row['l0']:.1f}",
                    f"{row['norm_mse']:.4f}",
                    "-" if row.get("kl") is None else f"{row['kl']:.4f}",
                    row["dead_features"],
                ]
                for row in result.rows
            ],
        )
        typer.echo('KL in nats per token; "-" where there is no one block to splice into')
        typer.echo(f"wrote {len(entries)} dictionaries, each to its folder in {folder}")
        for path in written:
            typer.echo(f"wrote {path}")


def _run_settings(label: Any, run: Any, content: dict[str, Any], cfg: Any) -> dict[str, Any]:
    """A run's own fields, and those the file gives for all runs that its architecture has."""
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    from sae_lens_route.sweep import SPARSITY_FIELDS

    run = {} if run is None else run
    if not isinstance(run, dict):
        raise ValueError(f"run {label!r} of the sweep: {run!r} must be fields and values")
    if "architecture" in content:
        run = {"architecture": content["architecture"], **run}
    architecture = run.get("architecture", "route_topk")
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        return run  # `expand_runs` says what there is
    of_architecture = _options_of(SAE_TRAINING_CLASS_REGISTRY[architecture][1], "sae")
    options = {option.field: option for option in of_architecture}
    shared = {name for name, option in _options().items() if option.owner == "sae"}
    settings: dict[str, Any] = {"d_sae": cfg.sae.d_sae, "device": cfg.device, "dtype": cfg.dtype}
    settings |= {name: content[name] for name in content if name in shared and name in options}
    options["blocks"] = _Option("blocks", "sae", "list[int]", None, "")
    settings.pop("d_in", None)
    for name, value in run.items():
        option = options.get(name)
        several = name in SPARSITY_FIELDS and isinstance(value, list)
        values = value if several else [value]
        if option is not None:
            values = [_parse(option, v) if isinstance(v, str) else v for v in values]
            try:
                values = [_checked(option, v) for v in values]
            except ValueError as error:
                raise ValueError(f"run {label!r} of the sweep: {error}") from error
        settings[name] = values if several else values[0]
    return settings


def _print_sweep(runner: Any) -> None:
    """The dictionaries of a sweep before it starts."""
    from sae_lens_route.sweep import SPARSITY_FIELDS

    def sparsity(sae: Any) -> str:
        given = {name: getattr(sae, name, None) for name in SPARSITY_FIELDS}
        return " ".join(f"{name}={value}" for name, value in given.items() if value is not None)

    _print_rows(
        ["", "architecture", "sparsity", "d_sae", "blocks", "seed", "parameters"],
        [
            [
                name,
                sae.cfg.architecture(),
                sparsity(sae.cfg),
                f"{sae.cfg.d_sae:,}",
                " ".join(map(str, sae.cfg.metadata.routed_layers)),
                runner.entries[name].seed,
                f"{sum(p.numel() for p in sae.parameters()):,}",
            ]
            for name, sae in runner.saes.items()
        ],
    )


def _print_rows(header: list[str], rows: list[list[Any]]) -> None:
    """A table with aligned columns; numbers to the right."""
    cells = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        first, *rest = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        typer.echo("  ".join([first.strip().ljust(widths[0]), *rest]))


# --- demo and info -----------------------------------------------------------------------------


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="A new folder.")] = Path("demo-output"),
    training_tokens: Annotated[int, typer.Option(min=10_000)] = 1_000_000,
    eval_tokens: Annotated[int, typer.Option(min=1_000)] = 30_000,
    seed: Annotated[int, typer.Option(help="Seed of the SAE's weights.")] = 42,
) -> None:
    """Train and evaluate a RouteSAE of the embedded language model, with no download."""
    with _one_line_errors():
        from sae_lens_route.demo import run_demo

        report = run_demo(
            output, training_tokens=training_tokens, eval_tokens=eval_tokens, seed=seed
        )
        shares = "  ".join(f"{b}:{s:.0%}" for b, s in report["share_per_block"].items())
        typer.echo(
            f"held-out NormMSE {report['norm_mse']:.4f}, L0 {report['l0']:.1f}, dead features "
            f"{report['dead_features']}, {report['tokens_per_second']:,.0f} tokens/s\n"
            f"share per block  {shares}"
        )
        for name in ["sae/", "report.json", *report["figures"]]:
            typer.echo(f"wrote {output / name}")


@app.command("eval")
def evaluate_sae(
    path: Annotated[Path, typer.Argument(help="A folder with a saved RouteSAE.")],
    dataset: Annotated[
        str | None,
        typer.Option(help="Held-out text; by default the demo corpus's, for the demo model."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to read.")] = 50_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Contexts in one forward pass.")] = 8,
    device: Annotated[str, typer.Option(help="Where the model and the SAE go.")] = "cpu",
    output: Annotated[
        Path | None, typer.Option(help="JSON file; by default eval.json in PATH.")
    ] = None,
) -> None:
    """Our metrics and SAELens's own `run_evals` for a saved RouteSAE, as JSON."""
    with _one_line_errors():
        from sae_lens_route.evals import evaluate, saelens_metrics

        model, sae = _load_sae_and_model(path, device)
        text = dataset or _held_out_text(sae.cfg.metadata.dataset_path)
        size = {"max_tokens": max_tokens, "batch_size": batch_size}
        ours = evaluate(model, sae, text, **size)
        theirs = saelens_metrics(model, sae, text, **size) if ours.downstream else None
        output = output or path / "eval.json"
        content = {"dataset": text, **size, "ours": ours.to_dict(), "saelens": _finite(theirs)}
        output.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        typer.echo(f"NormMSE {ours.reconstruction.norm_mse:.4f}, L0 {ours.reconstruction.l0:.1f}")
        for name, result in (
            ("", ours.downstream),
            (" unscaled (the paper's code)", ours.downstream_unscaled),
        ):
            if result is not None:
                typer.echo(
                    f"KL{name} {result.kl:.4f} nats per token, "
                    f"{result.kl_per_512_tokens:.1f} per 512 tokens"
                )
        typer.echo(f"wrote {output}")


def _finite(value: Any) -> Any:
    """NaN as null: SAELens divides by how often a feature fired, which can be never."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _load_sae_and_model(path: Path, device: str) -> tuple[Any, Any]:
    """The language model a saved RouteSAE was trained on, and the RouteSAE."""
    if not (path / "cfg.json").exists():
        raise ValueError(f"PATH={str(path)!r}: no cfg.json there, so no saved SAE")
    from sae_lens import SAE

    from sae_lens_route.models import load_model
    from sae_lens_route.saes import RoutedSAE

    sae = SAE.load_from_disk(path, device=device)
    if not isinstance(sae, RoutedSAE):
        raise ValueError(f"PATH={str(path)!r}: a {sae.cfg.architecture()} SAE, not a RouteSAE")
    metadata = sae.cfg.metadata
    kind = metadata.model_class_name or "HookedTransformer"
    kwargs = metadata.model_from_pretrained_kwargs or {}
    return load_model(metadata.model_name, kind, device=device, **kwargs), sae


def _held_out_text(trained_on: str) -> str:
    if trained_on == "demo":
        return "demo:heldout"
    raise ValueError(f"--dataset: name held-out text; training reads {trained_on!r}")


@app.command()
def features(
    path: Annotated[Path, typer.Argument(help="A folder with a saved RouteSAE.")],
    dataset: Annotated[str | None, typer.Option(help="Text; by default as for `eval`.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to read.")] = 1_000_000,
    threshold: Annotated[
        float | None,
        typer.Option(help="Activations above it are contexts. [default: 0.331 * sqrt(d_in)]"),
    ] = None,
    also: Annotated[
        list[float] | None,
        typer.Option(help="Another threshold to count interpretable features at; repeatable."),
    ] = None,
    min_contexts: Annotated[int, typer.Option(min=1)] = 4,
    reference: Annotated[
        bool, typer.Option("--reference", help="Rules of the paper's code; needs --threshold.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Contexts in one forward pass.")] = 8,
    device: Annotated[str, typer.Option(help="Where the model and the SAE go.")] = "cpu",
    output: Annotated[
        Path | None, typer.Option(help="A new folder; by default `features` in PATH.")
    ] = None,
) -> None:
    """Contexts of the features above a threshold, and each feature's layer profile, as parquet."""
    with _one_line_errors():
        from tqdm.auto import tqdm

        from sae_lens_route.activations import RoutedActivationsStore
        from sae_lens_route.features import ContextOptions, find_contexts, model_batches
        from sae_lens_route.runner import require_new_folder

        output = output or path / "features"
        require_new_folder(output, also_holds="features.parquet")
        if reference and threshold is None:
            raise ValueError("--reference: give the --threshold too (the paper's is 15 at d 2048)")
        if reference:
            options = ContextOptions.reference(threshold or 0.0)
        else:
            options = ContextOptions(threshold, tuple(also or ()), min_contexts=min_contexts)
        model, sae = _load_sae_and_model(path, device)
        text = dataset or _held_out_text(sae.cfg.metadata.dataset_path)
        store = RoutedActivationsStore.from_sae(
            model, sae, text, store_batch_size_prompts=batch_size
        )
        total = max(1, max_tokens // store.context_size // batch_size)
        tokens = tqdm(store.token_batches(max_tokens), desc="reading", unit="batch", total=total)
        table = find_contexts(sae, model_batches(model, sae, tokens), model.tokenizer, options)
        table.to_parquet(output)
        table.to_reference_json(output / "contexts.json")
        for count in table.run.counts:
            typer.echo(
                f"threshold {count.threshold:.3f}: {count.n_features} interpretable features"
            )
        typer.echo(f"wrote {output}")


@app.command()
def interpret(
    path: Annotated[Path, typer.Argument(help="A folder that `features` wrote.")],
    model: Annotated[
        str | None, typer.Option(help="Judge; without one, the offline statistic ranks features.")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible endpoint; key in OPENAI_API_KEY.")
    ] = None,
    n_features: Annotated[int, typer.Option(min=1, help="Features to sample.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
) -> None:
    """Score features with a language model as judge (paper 3.4), or rank them without one."""
    with _one_line_errors():
        from sae_lens_route.features import FeatureTable
        from sae_lens_route.interpret import Judge, offline_ranking, write_offline_ranking

        if not (path / "features.parquet").exists():
            raise ValueError(f"PATH={str(path)!r}: no features.parquet; `features` writes one")
        table = FeatureTable.from_parquet(path)
        if model is None:
            output = path / "offline_ranking.json"
            ranking = offline_ranking(table, seed)
            write_offline_ranking(ranking, output)
            typer.echo(f"{len(ranking)} features ranked by surface cues (not the paper's score)")
        else:
            output = path / "judge.jsonl"
            judge = Judge(model, base_url=base_url, concurrency=concurrency)
            run = judge.run(table, output, n_features=n_features, seed=seed)
            typer.echo(json.dumps(run.summary._asdict(), indent=1))
        typer.echo(f"wrote {output}")


class Where(str, Enum):
    """Tokens to steer."""

    prompt = "prompt"
    generated = "generated"
    both = "both"


@app.command()
def steer(
    path: Annotated[Path, typer.Argument(help="A folder with a saved RouteSAE.")],
    prompt: Annotated[str, typer.Argument(help="What the model goes on from.")],
    edit: Annotated[
        list[str],
        typer.Option(help="FEATURE:set|add|scale:VALUE or FEATURE:ablate; repeatable."),
    ],
    where: Annotated[Where, typer.Option(help="Which tokens to steer.")] = Where.both,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[
        float | None, typer.Option(min=0.01, help="Sample at this temperature; without it, greedy.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    chat_template: Annotated[bool, typer.Option(help="Use the tokenizer's, if it has one.")] = True,
    device: Annotated[str, typer.Option(help="Where the model and the SAE go.")] = "cpu",
    output: Annotated[Path | None, typer.Option(help="Also write everything as JSON.")] = None,
) -> None:
    """Let the model write with features edited, beside what it writes without."""
    with _one_line_errors():
        from sae_lens_route.steering import FeatureEdit, render
        from sae_lens_route.steering import steer as steer_text

        edits = [FeatureEdit.parse(text) for text in edit]
        model, sae = _load_sae_and_model(path, device)
        result = steer_text(
            model,
            sae,
            prompt,
            edits,
            where=where.value,
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
    path: Annotated[Path, typer.Argument(help="A folder with a saved RouteSAE.")],
    dataset: Annotated[str | None, typer.Option(help="Text; by default as for `eval`.")] = None,
    feature: Annotated[
        list[int] | None, typer.Option(help="A feature to show; repeatable. [default: strongest]")
    ] = None,
    n_features: Annotated[int, typer.Option(min=1, help="How many of the strongest.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to read.")] = 50_000,
    device: Annotated[str, typer.Option(help="Where the model and the SAE go.")] = "cpu",
    output: Annotated[
        Path | None, typer.Option(help="HTML file; by default dashboard.html in PATH.")
    ] = None,
) -> None:
    """One page of features that opens with no network: activations, contexts, layers, routes."""
    with _one_line_errors():
        from sae_lens_route.activations import RoutedActivationsStore
        from sae_lens_route.dashboards import write_dashboard

        model, sae = _load_sae_and_model(path, device)
        store = RoutedActivationsStore.from_sae(
            model, sae, dataset or _held_out_text(sae.cfg.metadata.dataset_path)
        )
        output = output or path / "dashboard.html"
        write_dashboard(
            model,
            sae,
            store,
            output,
            features=feature or None,
            n_features=n_features,
            max_tokens=max_tokens,
        )
        typer.echo(f"wrote {output}")


@app.command()
def reproduce(
    output: Annotated[Path, typer.Option(help="Folder; what is there is not made again.")] = Path(
        "reproduction"
    ),
    config: Annotated[
        Path | None, typer.Option(help="A run as `train --config` takes it. [default: the demo's]")
    ] = None,
    k: Annotated[int | None, typer.Option(min=1, help="Sparsity of the main comparison.")] = None,
    other_k: Annotated[
        list[int] | None, typer.Option(help="Another sparsity for the trade-off; repeatable.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the main comparison.")] = 3,
    dataset: Annotated[
        str | None, typer.Option(help="Held-out text; the demo has its own.")
    ] = None,
    eval_tokens: Annotated[int, typer.Option(min=1, help="Held-out tokens to read.")] = 20_000,
    feature_tokens: Annotated[
        int, typer.Option(min=1, help="Held-out tokens to find features in.")
    ] = 30_000,
    judge: Annotated[
        str | None, typer.Option(help="Judge model; without one only the offline statistic.")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible endpoint; key in OPENAI_API_KEY.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="Markdown file whose marked tables are rewritten.")
    ] = None,
) -> None:
    """The paper's tables and figures: every method trained on one stream and evaluated alike."""
    with _one_line_errors():
        from sae_lens_route.reproduction import (
            DEMO_K,
            DEMO_OTHER_KS,
            DEMO_TOKENS,
            Reproduction,
            reproduce,
        )

        if page is not None and not page.exists():
            raise ValueError(f"--page={str(page)!r}: no such file")
        if config is None:
            from sae_lens_route.demo import demo_config

            cfg = demo_config(output, training_tokens=DEMO_TOKENS)
            ks, others = k or DEMO_K, DEMO_OTHER_KS if other_k is None else tuple(other_k)
            dataset = dataset or "demo:heldout"
        else:
            cfg = runner_config(_read_config_file(config))
            ks, others = k or cfg.sae.k, tuple(other_k or ())
            if dataset is None:
                raise ValueError("--dataset: name held-out text to evaluate on")
        what = Reproduction(
            cfg=cfg,
            k=ks,
            other_ks=others,
            seeds=tuple(range(seeds)),
            eval_dataset=dataset,
            eval_tokens=eval_tokens,
            feature_tokens=feature_tokens,
            output=output,
            judge=judge,
            base_url=base_url,
        )
        content = reproduce(what, page=page)
        stages = ("methods", "differences", "share_matched")
        n_trained = sum(len(content[stage]) for stage in stages)
        typer.echo(f"{n_trained} dictionaries in {content['seconds'] / 60:.0f} minutes")
        typer.echo(f"wrote {output}" + ("" if page is None else f" and the tables of {page}"))


@app.command()
def info(path: Annotated[Path, typer.Argument(help="A folder with a saved SAE.")]) -> None:
    """What a saved SAE is and what it was trained on, as JSON."""
    with _one_line_errors():
        config_file = path / "cfg.json"
        if not config_file.exists():
            raise ValueError(f"PATH={str(path)!r}: no cfg.json there, so no saved SAE")
        from safetensors import safe_open

        content = json.loads(config_file.read_text())
        with safe_open(path / "sae_weights.safetensors", framework="pt") as weights:
            shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        json.dump({"cfg": content, "weights": shapes}, sys.stdout, indent=1)
        typer.echo()
