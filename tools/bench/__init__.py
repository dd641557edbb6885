"""What `tools/bench_distil.py` is made of: profiles, models, losses, steps, worker, memory, report."""
