"""Measures time and memory of a distillation step against the original's, TRL's and Liger's, in one run.

    python tools/bench_distil.py --profile cpu [--output benchmarks/distil-cpu.json]

All rows use the same shapes and tokens; each turn of a row is a fresh process group, and turns alternate (A B C, then
C B A). `benchmarks/README.md` says what each row is and how time and memory are measured. Profiles that start with
`gpu-` need one GPU with 80 GB.
"""

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path

from bench.profiles import PROFILES, SHOWN

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=PROFILES, metavar="|".join(SHOWN), help="what to measure")
    parser.add_argument(
        "--only",
        default="",
        help="only rows whose name contains one of these (A,B); by default nothing is then written",
    )
    parser.add_argument("--turns", type=_count, default=None, help="turns per row, instead of the profile's number")
    parser.add_argument(
        "--steps", type=_count, default=None, help="timed steps per turn, instead of the profile's number"
    )
    parser.add_argument(
        "--kernels", type=_count, default=0, help="list this many GPU kernels that take most of minima's step"
    )
    parser.add_argument("--traces", type=Path, default=None, help="folder for traces of these steps")
    parser.add_argument(
        "--largest",
        type=_sizes,
        default={},
        help="largest micro-batches that fit, from an earlier run, instead of searching for them: NAME=N,NAME=N",
    )
    parser.add_argument("--output", type=Path, default=None, help="default: benchmarks/distil-PROFILE.json")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        from bench.worker import work

        work(json.loads(options.worker.read_text()))
        return
    if not options.profile:
        parser.error(f"--profile is one of {', '.join(SHOWN)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that no rank is left behind
    options.kernels = options.kernels or (20 if options.traces else 0)
    if options.kernels and PROFILES[options.profile].device != "cuda":
        parser.error(f"--kernels and --traces need a GPU, but the profile {options.profile} runs on CPUs")
    searched = [row.name for row in PROFILES[options.profile].rows if not row.micro_batch]
    if unknown := [name for name in options.largest if name not in searched]:
        parser.error(f"--largest: {unknown} do not use a largest micro-batch in {options.profile}; only {searched} do")
    sys.exit(_bench(options))


def _count(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _sizes(text: str) -> dict[str, int]:
    """Parse `NAME=N,NAME=N`."""
    found = {}
    for pair in filter(None, text.split(",")):
        name, _, size = pair.partition("=")
        if not size.isdecimal() or not int(size):
            raise argparse.ArgumentTypeError(f"{pair!r} is not NAME=N with a number of sequences N")
        found[name] = int(size)
    return found


def _bench(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from bench.report import into_page, report, table
    from bench.running import Run

    from minima.launcher import num_accelerators

    profile = PROFILES[options.profile]
    if profile.device == "cuda" and not num_accelerators():
        print(f"The profile {profile.name} needs a GPU, but this machine has none, so nothing was measured. "
              "Run it on a machine with a GPU, or use --profile cpu.", file=sys.stderr)  # fmt: skip
        return 2
    if profile.device == "cuda":
        import torch  # noqa: F401  # the report needs it; a run that is stopped may have only seconds left for one
    wanted = options.only.split(",")
    rows = tuple(row for row in profile.rows if any(part in row.name for part in wanted))
    if options.turns:
        rows = tuple(replace(row, turns=options.turns) for row in rows)
    if options.steps:
        profile = replace(profile, steps=options.steps, loss_repeats=options.steps)
    if not rows:
        print(
            f"No row of {profile.name} contains {options.only!r}: {[row.name for row in profile.rows]}", file=sys.stderr
        )
        return 2
    interrupted = False
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(
            replace(profile, rows=rows),
            Path(__file__).resolve(),
            Path(scratch),
            lambda line: print(line, flush=True),
            options.largest,
            options.kernels,
            str(options.traces or ""),
        )
        try:
            run.run()
        except (KeyboardInterrupt, SystemExit) as stopped:  # keep the results, which may have taken hours
            print(f"stopped ({stopped!r}): rows without a turn were not run", file=sys.stderr)
            interrupted = True
    found = report(run.profile, run.turns, run.ceilings)
    shown = table(found)
    print(shown)
    output = options.output
    if output is None and not options.only and not interrupted:
        output = ROOT / "benchmarks" / f"distil-{profile.name}.json"
        page = ROOT / "benchmarks" / "README.md"
        page.write_text(into_page(page.read_text(encoding="utf-8"), profile.name, shown), encoding="utf-8")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if interrupted or any(row["status"] == "failed" or row.get("failed_turns") for row in found["rows"]) else 0


if __name__ == "__main__":
    main()
