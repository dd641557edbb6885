"""`minima law`: its sub-commands and their options."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from minima.errors import TableError

Write = Callable[[str], None]


def add_law(commands: argparse._SubParsersAction, write: Write) -> None:
    """Add `minima law` to the command's parser."""
    law = commands.add_parser("law", help="the law of capacity gap: measure it, fit it, choose a teacher with it")
    parts = law.add_subparsers(required=True, metavar="COMMAND")

    study = parts.add_parser("study", help="train a grid of teachers and students, and make its table")
    study.add_argument("recipe", help="a study's YAML file, or the name of a shipped one: law-small")
    study.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help="change the study")
    study.add_argument("--workers", type=int, metavar="N", help="parallel processes; default: one per GPU or core")
    study.add_argument("--dry-run", action="store_true", help="show the grid and its cost; run nothing")
    study.add_argument("--collect", action="store_true", help="run nothing; write the table of finished runs")
    study.add_argument("--cluster", metavar="FILE", help="submit Slurm arrays: YAML, as for `minima submit`")
    study.add_argument("--runs", metavar="A,B", help="only these runs of the grid, in this process")
    study.set_defaults(command=lambda options: _study(options, write))

    fit = parts.add_parser("fit", help="the best teacher of every student, the line through them, the scaling law")
    fit.add_argument("table", metavar="TABLE", help="CSV or Parquet, one row per finished student run")
    _table_options(fit)
    fit.add_argument("--output", metavar="FILE", help="where to save the fit; default: TABLE's name with .fit.json")
    fit.add_argument("--json", action="store_true", help="show the saved JSON instead of the report")
    fit.set_defaults(command=lambda options: _fit(options, write))

    recommend = parts.add_parser("recommend", help="recommend a teacher for a student")
    recommend.add_argument("--student", required=True, metavar="N", help="its parameters: 2.7e9 or 2.7B")
    recommend.add_argument("--tokens", metavar="N", help="of the distillation; without it only the paper's law answers")
    recommend.add_argument("--teachers", metavar="A,B", help="the available teachers; any size when not given")
    recommend.add_argument(
        "--teacher-tokens-per-parameter", metavar="X", default="20",
        help="how long teachers are trained, for the scaling law; default: 20",
    )  # fmt: skip
    recommend.add_argument("--fit", metavar="FILE", help="a fit saved by `minima law fit`: your own laws answer, too")
    recommend.add_argument("--json", action="store_true", help="show the answers as JSON")
    recommend.set_defaults(command=lambda options: _recommend(options, write))

    plot = parts.add_parser("plot", help="draw a fit, as PNG and SVG")
    plot.add_argument("source", metavar="FIT", help="a fit saved by `minima law fit`, or a table to fit first")
    _table_options(plot)
    plot.add_argument(
        "--output",
        metavar="NAME",
        help="write NAME.png and NAME.svg (such an ending of NAME is removed); default: FIT's name",
    )
    plot.set_defaults(command=lambda options: _plot(options, write))


def _table_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sizes", choices=("non_embedding", "all"), default="non_embedding", help="which parameters count as size"
    )
    parser.add_argument(
        "--budget", choices=("tokens", "ratio"), default="tokens",
        help="whether the students of one line have equal tokens or equal tokens per parameter",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draws over seeds; default: 0")


def _needs(*packages: str) -> None:
    """Refuse at the start if an optional package is missing."""
    from importlib.util import find_spec

    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise TableError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            "`minima law` fits with scipy and draws with matplotlib, which nothing else in minima needs",
            "pip install scipy matplotlib",
        )


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise TableError(f"--seed {seed}", "seeds of random draws cannot be negative", "give 0 or a positive number")


def _check_output(path: Path) -> None:
    """Refuse an output that could not be written, before anything is computed.

    Raises:
        TableError: it is a folder, or its folder is missing or not writable.
    """
    problem = ""
    if not path.name or path.is_dir():
        problem = "is a folder"
    elif not path.parent.is_dir():
        problem = f"lies in {path.parent}, which is not a folder"
    elif not os.access(path.parent, os.W_OK):
        problem = f"lies in {path.parent}, which is not writable"
    if problem:
        raise TableError(
            f"the output {path} {problem}",
            "the result would be lost at the end",
            "give --output a file in an existing folder",
        )


def _study(options: argparse.Namespace, write: Write) -> int:
    from minima.law.study.running import study
    from minima.stages.shipped import find_recipe

    return study(
        find_recipe(options.recipe),
        options.overrides,
        write,
        workers=options.workers,
        collect_only=options.collect,
        dry_run=options.dry_run,
        cluster=None if options.cluster is None else Path(options.cluster).expanduser(),
        runs=None if options.runs is None else [name.strip() for name in options.runs.split(",")],
    )


def _fit(options: argparse.Namespace, write: Write) -> int:
    _needs("scipy")
    from minima.law.fit.fitting import fit_table, to_json, write_fit
    from minima.law.report import render_fit

    table = Path(options.table).expanduser()
    output = table.with_suffix(".fit.json") if table.name else table
    output = output if options.output is None else Path(options.output).expanduser()
    _check_seed(options.seed)
    if options.output is not None or table.is_file():  # a missing table has an error of its own
        _check_output(output)
    fit = fit_table(table, options.sizes, options.budget, options.seed)
    write_fit(fit, output)
    write(to_json(fit).rstrip() if options.json else f"{render_fit(fit)}\n\nsaved in {output}")
    return 0


def _recommend(options: argparse.Namespace, write: Write) -> int:
    _needs("scipy")
    from pydantic import TypeAdapter

    from minima.law.fit.fitting import read_fit
    from minima.law.recommend import Question, Recommendation, recommend
    from minima.law.report import render_recommendation
    from minima.law.sizes_text import parse_number

    teachers = [text for text in (options.teachers or "").split(",") if text.strip()]
    question = Question(
        parse_number(options.student, "--student"),
        None if options.tokens is None else parse_number(options.tokens, "--tokens"),
        tuple(sorted({parse_number(text, "--teachers") for text in teachers})),
        parse_number(options.teacher_tokens_per_parameter, "--teacher-tokens-per-parameter"),
    )
    found = recommend(question, None if options.fit is None else read_fit(Path(options.fit)))
    as_json = options.json and TypeAdapter(Recommendation).dump_json(found, indent=1).decode()
    write(as_json or render_recommendation(found))
    return 0


def _plot(options: argparse.Namespace, write: Write) -> int:
    _needs("scipy", "matplotlib")
    from minima.law.fit.fitting import fit_table, read_fit
    from minima.law.plot import figure_paths, plot_fit

    source = Path(options.source).expanduser()
    name = source.name.removesuffix(".json").removesuffix(".fit").removesuffix(".csv").removesuffix(".parquet")
    output = source.with_name(name) if name else source
    if options.output is not None:
        output = Path(options.output).expanduser()
        output = output.with_suffix("") if output.suffix.lower() in (".png", ".svg") else output
    _check_seed(options.seed)
    if options.output is not None or source.is_file():
        for path in figure_paths(output) if output.name else [output]:
            _check_output(path)
    if source.suffix.lower() in (".csv", ".parquet"):
        fit = fit_table(source, options.sizes, options.budget, options.seed)
    else:
        fit = read_fit(source)
    for path in plot_fit(fit, output):
        write(f"drawn in {path}")
    return 0
