"""The project's own checkpoint: safetensors per rank with checksums, and nothing that runs code when it is read."""
