"""What a turn of a row found, made up."""


def turn(seconds: list[float], peak: int = 300, **fields) -> dict:
    return {
        "status": "measured", "tokens": 1000, "seconds": seconds, "processor_seconds": seconds, "loss": 1.0,
        "micro_batch": 4, "idle_bytes": 100, "peak_bytes": peak, "peak_above_idle_bytes": peak - 100,
        "collective_bytes": 800, "host_to_device_bytes": 0, **fields,
    }  # fmt: skip
