"""The parts of `tools/bench_distil.py`: profiles, models, losses, steps, worker, memory, report."""
