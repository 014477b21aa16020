"""The command `concepts`: ground truth for what features mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sae_lens_route.cli.application import app, print_table
from sae_lens_route.cli.options import BatchSize, Device, ModelName, TrustRemoteCode
from sae_lens_route.errors import UserError


@app.command()
def concepts(
    paths: Annotated[
        list[Path], typer.Argument(help="Folders of saved SAEs or sweeps, all of one model.")
    ],
    dev: Annotated[
        Path | None, typer.Option(help="CoNLL-U file to choose features and thresholds on.")
    ] = None,
    test: Annotated[
        Path | None,
        typer.Option(help="Another to score them on.", show_default="half of --dev's documents"),
    ] = None,
    python: Annotated[
        bool, typer.Option("--python", help="Label the demo corpus's held-out Python instead.")
    ] = False,
    max_characters: Annotated[
        int, typer.Option(min=10_000, help="Of Python to read, with --python.")
    ] = 400_000,
    max_concepts: Annotated[int, typer.Option(min=1, help="The most frequent of each level.")] = 64,
    together: Annotated[
        list[str] | None,
        typer.Option(
            help="Read the dictionaries of a seed whose method begins with this as one, as a "
            "dictionary for each block; repeatable."
        ),
    ] = None,
    probes: Annotated[
        bool, typer.Option("--probes", help="Also fit probes on 1 and 5 features.")
    ] = False,
    baselines: Annotated[bool, typer.Option(help="Compare with baselines.")] = True,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    model_name: ModelName = None,
    trust_remote_code: TrustRemoteCode = False,
    output: Annotated[
        Path | None, typer.Option(help="A folder.", show_default="`concepts` in the first PATH")
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            help="Markdown file whose tables NAME and NAME-depth are rewritten, NAME being the "
            "output folder's."
        ),
    ] = None,
) -> None:
    """Which annotated concepts single features recover, by level, against baselines and chance."""
    from sae_lens_route.data.annotations import read_conllu
    from sae_lens_route.data.concept_tokens import concept_tokens
    from sae_lens_route.data.python_labels import python_documents
    from sae_lens_route.evals.concepts import recover_concepts
    from sae_lens_route.paper.concept_recovery import (
        RecoveryReport,
        dictionaries_in,
        read_together,
        readers_of,
    )
    from sae_lens_route.paper.markdown import fill_tables, markdown
    from sae_lens_route.plots import write_figure
    from sae_lens_route.records import as_json
    from sae_lens_route.splice.language_model import load_model_of

    if page is not None and not page.exists():
        raise UserError(f"--page={str(page)!r}: no such file")
    if python == (dev is not None):
        raise UserError("give either --dev (and --test), or --python")
    if dev is None:
        documents, is_test = python_documents(max_characters=max_characters), None
    else:
        documents, is_test = read_conllu(dev), None
        if test is not None:
            others = read_conllu(test)
            is_test = [False] * len(documents) + [True] * len(others)
            documents = [*documents, *others]
    dictionaries = dictionaries_in(paths, device)
    for prefix in together or ():
        dictionaries = read_together(dictionaries, prefix)
    sae = dictionaries[0].saes[0]
    model = load_model_of(sae, model_name, device, trust_remote_code)
    tokens = concept_tokens(
        documents, sae, model.tokenizer, is_test=is_test, max_concepts_per_level=max_concepts
    )
    result = recover_concepts(
        model,
        readers_of(dictionaries, baselines),
        tokens,
        batch_size=batch_size,
        probe_sizes=(1, 5) if probes else (),
    )
    output = output or paths[0] / "concepts"
    output.mkdir(parents=True, exist_ok=True)
    report = RecoveryReport(result, dictionaries)
    recovery, depth = report.table(), report.depth_table()
    typer.echo(
        f"{len(tokens.concepts)} concepts, {result.n_dev_tokens:,} tokens to choose on, "
        f"{result.n_test_tokens:,} to score on; mean best-feature F1"
    )
    print_table(*recovery)
    typer.echo("mean block where the features of recovered concepts live (number of concepts)")
    print_table(*depth)
    content = result.to_dict()
    files = [output / "concepts.json", output / "summary.json"]
    files[0].write_text(as_json(content))
    for scores in content["dictionaries"].values():
        del scores["concepts"]
    files[1].write_text(as_json(content))
    for name, figure in report.figures().items():
        files += write_figure(figure, output / name)
    if page is not None:
        name = output.resolve().name
        fill_tables(page, {name: markdown(*recovery), f"{name}-depth": markdown(*depth)})
        files.append(page)
    for path in files:
        typer.echo(f"wrote {path}")
