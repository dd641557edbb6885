"""Measures what exact resume costs a training run: checkpoints and, on a GPU, `deterministic: true`, with real ranks.

    python tools/bench_checkpoint.py [--ranks 2] [--width 512] [--layers 6] [--steps 24] [--every 12] [--folder DIR]
        [--sequences 2] [--sequence-tokens 128] [--precision float32]

Variants: `none`, no checkpoint; `waiting`, written while training waits; `beside`, written in the background;
`deepspeed`, DeepSpeed's own `save_checkpoint` of the same engine, for which training waits (it neither syncs nor hashes
what it writes); `fixed bits`, no checkpoint but deterministic algorithms (on a CPU they always are; this shows the cost
of the setting itself). For each it prints seconds per step including checkpoints, the share of time that training was
stopped for them, and bytes per second from the snapshot to the complete checkpoint. The variants alternate, round after
round, on the same model; compare ratios within one run, because machines differ. The folder determines the disk that is
measured: give the one where your runs are stored.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from minima.launcher import child_environment, default_ranks, free_port, read_launch

WAYS = ("none", "waiting", "beside", "deepspeed", "fixed bits")
OURS, WRITTEN = ("waiting", "beside"), ("waiting", "beside", "deepspeed")
VOCABULARY = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=default_ranks())
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--sequences", type=int, default=2, help="per rank and step")
    parser.add_argument("--sequence-tokens", type=int, default=128)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=24, help="per variant and round")
    parser.add_argument("--every", type=int, default=12, help="steps between checkpoints")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="for the checkpoints; default: a temporary folder")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        _rank(options)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        port, ranks = free_port(), []
        for rank in range(options.ranks):
            place = {"RANK": rank, "WORLD_SIZE": options.ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": options.ranks}
            environment = child_environment(options.ranks) | {name: str(value) for name, value in place.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            command = [sys.executable, __file__, *sys.argv[1:], "--rank", "--folder", folder]
            ranks.append(subprocess.Popen(command, env=environment))
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            sys.exit(f"ranks ended with exit codes {codes}")
        _print(json.loads((Path(folder) / "results.json").read_text()))


def _rank(options: argparse.Namespace) -> None:
    import torch

    from minima.batch import make_batch
    from minima.engine import distributed
    from minima.engine.checkpoint.shards import shapes, snapshot_shards
    from minima.engine.checkpoint.writer import CheckpointWriter
    from minima.engine.deepspeed_config import training_config
    from minima.engine.determinism import fix_bits
    from minima.engine.loop import Votes, train_step
    from minima.engine.meters import Meters
    from minima.engine.objectives.language_modelling import LanguageModelling
    from minima.engine.student import Student
    from minima.models.shape import ModelShape
    from minima.models.weights import RandomSource
    from minima.recipe.training import Training
    from minima.stages.shipped import shipped_folder

    distributed.start(read_launch())
    shape = ModelShape(
        vocabulary_size=VOCABULARY, hidden_size=options.width, intermediate_size=options.width * 5 // 2,
        num_layers=options.layers, num_heads=options.width // 64, max_positions=options.sequence_tokens,
    )  # fmt: skip
    settings = Training(
        batch_sequences=options.sequences * options.ranks, micro_batch_sequences=options.sequences, steps=1,
        learning_rate=1e-4, precision=options.precision, activation_checkpointing="none",
    )  # fmt: skip
    config = training_config(shipped_folder("ds_configs") / "student_zero3.json", settings, options.ranks, shape)
    student = Student(RandomSource(shape.to_config(), seed=1), config, settings)
    tokens_BT = torch.randint(0, VOCABULARY, (options.sequences, options.sequence_tokens), device=student.device)
    batch = make_batch(tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool), None)

    facts = {"ranks": options.ranks, "config": student.config, "shapes": shapes(student), "optimizer_steps": 0}
    writer = CheckpointWriter(options.folder / "checkpoints", keep=1)
    theirs = options.folder / "deepspeed"
    meters, objective = Meters(student.device), LanguageModelling()
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for turn in range(options.rounds * len(WAYS) + 1):  # the first turn is a warm-up
        way, steps = WAYS[turn % len(WAYS)], options.steps if turn else 2
        torch.use_deterministic_algorithms(False)
        if way == "fixed bits":
            fix_bits()
        distributed.barrier()
        saved: list[float] = []
        began = time.perf_counter()
        for step in range(1, steps + 1):  # as in the training loop
            votes = Votes(0, int(writer.writing))
            agreed = train_step(student, objective, [batch], settings.learning_rate, meters, votes).votes
            if not agreed.writing:
                writer.finish()
            if step % options.every != options.every // 2:
                continue
            if way in OURS:
                writer.begin(step, lambda: snapshot_shards(student), {**facts, "step": step})
            if way == "waiting":
                writer.finish()
            if way == "deepspeed":
                before = time.perf_counter()
                student.engine.save_checkpoint(str(theirs), tag=f"step-{step}")
                saved.append(time.perf_counter() - before)
        seconds = time.perf_counter() - began
        writer.finish()
        times = writer.take_times()
        if saved:
            distributed.barrier()
            size = sum(file.stat().st_size for file in theirs.rglob("*") if file.is_file()) / len(saved)
            times = {"checkpoint_wait_seconds": sum(saved), "checkpoint_seconds": saved[-1], "checkpoint_bytes": size}
            distributed.barrier()
            if distributed.is_main():
                shutil.rmtree(theirs)
        if turn:
            share = times.get("checkpoint_wait_seconds", 0.0) / seconds
            found[way].append({"seconds": seconds / steps, "share": share, **times})
    if distributed.is_main():
        results = {"parameters": shape.parameters, "options": vars(options) | {"folder": ""}, "ways": found}
        (options.folder / "results.json").write_text(json.dumps(results))
    distributed.barrier()
    distributed.leave()


def _print(results: dict) -> None:
    options, ways = results["options"], results["ways"]
    print(f"{results['parameters']:,} parameters on {options['ranks']} ranks, a checkpoint every {options['every']} "
          f"steps, medians of {options['rounds']} rounds")  # fmt: skip
    without = statistics.median(round_["seconds"] for round_ in ways["none"])
    print(f"{'variant':<10}{'s/step':>10}{'slower by':>11}{'stopped':>13}{'MB':>9}{'s':>8}{'MB/s':>8}")
    for way, rounds in ways.items():
        seconds = statistics.median(round_["seconds"] for round_ in rounds)
        share = statistics.median(round_["share"] for round_ in rounds)
        line = f"{way:<10}{seconds:>10.3f}{seconds / without - 1:>11.1%}{share:>13.1%}"
        if way in WRITTEN:
            size = statistics.median(round_["checkpoint_bytes"] for round_ in rounds) / 1e6
            cost = statistics.median(round_["checkpoint_seconds"] for round_ in rounds)
            line += f"{size:>9.1f}{cost:>8.2f}{size / cost:>8.0f}"
        print(line)


if __name__ == "__main__":
    main()
