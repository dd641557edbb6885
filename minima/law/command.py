"""`minima law`: its sub-commands and their options."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from minima.errors import TableError

Write = Callable[[str], None]


def add_law(commands: argparse._SubParsersAction, write: Write) -> None:
    """Hang `minima law` into the command's parser.

    Args:
        commands: where sub-commands are added.
        write: shows text to the person.
    """
    law = commands.add_parser("law", help="the law of capacity gap: measure it, fit it, choose a teacher by it")
    parts = law.add_subparsers(required=True, metavar="COMMAND")

    study = parts.add_parser("study", help="train a grid of teachers and students, and make its table")
    study.add_argument("recipe", help="a study's YAML file, or the name of a shipped one: law-small")
    study.add_argument("overrides", nargs="*", metavar="key.path=value", help="change the study")
    study.add_argument("--workers", type=int, metavar="N", help="processes at one time; one for each GPU or core")
    study.add_argument("--dry-run", action="store_true", help="show the grid and what it costs; run nothing")
    study.add_argument("--collect", action="store_true", help="run nothing; make the table of what is finished")
    study.add_argument("--cluster", metavar="FILE", help="submit it as Slurm arrays: YAML, as for `minima submit`")
    study.add_argument("--runs", metavar="A,B", help="only these runs of the grid, in this process")
    study.set_defaults(command=lambda options: _study(options, write))

    fit = parts.add_parser("fit", help="the best teacher of every student, the line through them, the scaling law")
    fit.add_argument("table", metavar="TABLE", help="CSV or Parquet, one row for each finished student run")
    _table_options(fit)
    fit.add_argument("--output", metavar="FILE", help="where to keep the fit; TABLE's name with .fit.json by default")
    fit.add_argument("--json", action="store_true", help="show the JSON that is kept instead of the report")
    fit.set_defaults(command=lambda options: _fit(options, write))

    recommend = parts.add_parser("recommend", help="the teacher to take for a student")
    recommend.add_argument("--student", required=True, metavar="N", help="its parameters: 2.7e9 or 2.7B")
    recommend.add_argument("--tokens", metavar="N", help="of the distillation; without it only the paper's law answers")
    recommend.add_argument("--teachers", metavar="A,B", help="those at hand; any size when not given")
    recommend.add_argument(
        "--teacher-tokens-per-parameter", metavar="X", default="20",
        help="training of the teachers, for the scaling law; 20 by default",
    )  # fmt: skip
    recommend.add_argument("--fit", metavar="FILE", help="what `minima law fit` kept: your own laws answer, too")
    recommend.add_argument("--json", action="store_true", help="show the answers as JSON")
    recommend.set_defaults(command=lambda options: _recommend(options, write))

    plot = parts.add_parser("plot", help="the figure of a fit, as PNG and SVG")
    plot.add_argument("source", metavar="FIT", help="what `minima law fit` kept, or a table, which is fitted first")
    _table_options(plot)
    plot.add_argument(
        "--output",
        metavar="NAME",
        help="NAME.png and NAME.svg (an ending in one of these is left out); FIT's name by default",
    )
    plot.set_defaults(command=lambda options: _plot(options, write))


def _table_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sizes", choices=("non_embedding", "all"), default="non_embedding", help="which parameters a size is"
    )
    parser.add_argument(
        "--budget", choices=("tokens", "ratio"), default="tokens",
        help="students of one line have equal tokens, or equal tokens per parameter",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws over seeds; 0 by default")


def _needs(*packages: str) -> None:
    """Refuse before anything is done when an optional package is missing."""
    from importlib.util import find_spec

    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise TableError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            "`minima law` fits with scipy and draws with matplotlib, which nothing else here needs",
            "pip install scipy matplotlib",
        )


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise TableError(f"--seed {seed}", "the draws over seeds begin at it", "give a whole number from 0 on")


def _check_output(path: Path) -> None:
    """Refuse before anything is computed what could not be written at its end.

    Raises:
        TableError: it is a folder, or its own is missing or takes no files.
    """
    problem = ""
    if not path.name or path.is_dir():
        problem = "is a folder"
    elif not path.parent.is_dir():
        problem = f"lies in {path.parent}, which is no folder"
    elif not os.access(path.parent, os.W_OK):
        problem = f"lies in {path.parent}, where nothing may be written"
    if problem:
        raise TableError(
            f"the output {path} {problem}",
            "what is found would be lost at the end",
            "name a file in a folder that is there with --output",
        )


def _study(options: argparse.Namespace, write: Write) -> int:
    from minima.law.study import study
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
    from minima.law.fitting import fit_table, to_json, write_fit
    from minima.law.report import render_fit

    table = Path(options.table).expanduser()
    output = table.with_suffix(".fit.json") if table.name else table
    output = output if options.output is None else Path(options.output).expanduser()
    _check_seed(options.seed)
    if options.output is not None or table.is_file():  # a table that is not there is named as such
        _check_output(output)
    fit = fit_table(table, options.sizes, options.budget, options.seed)
    write_fit(fit, output)
    write(to_json(fit).rstrip() if options.json else f"{render_fit(fit)}\n\nkept in {output}")
    return 0


def _recommend(options: argparse.Namespace, write: Write) -> int:
    _needs("scipy")
    from pydantic import TypeAdapter

    from minima.law.fitting import read_fit
    from minima.law.recommend import Question, Recommendation, recommend
    from minima.law.recommend_text import render_recommendation
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
    from minima.law.fitting import fit_table, read_fit
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
