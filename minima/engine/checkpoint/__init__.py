"""minima's own checkpoint format: safetensors files per rank, with checksums. Reading one never executes code."""
