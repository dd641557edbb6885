"""Whether Triton can start a kernel on this machine's GPU. It builds a small module in C for that, at its first use."""

import functools
import logging

logger = logging.getLogger("minima.triton")
CURE = "install a C compiler and Python's headers (Debian: gcc and python3-dev) on every machine"


@functools.cache
def triton_trouble() -> str | None:
    """Why Triton cannot start a kernel here; None where it can. Asked once: whoever can do without it then does."""
    try:
        from triton.runtime import driver

        assert driver.active is not None
    except Exception as error:  # of a compiler, a linker, the driver's library or an import: whatever it is
        trouble = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        logger.warning(
            "Triton cannot start a kernel on this GPU (%s): losses and attention run without their fused kernels, "
            "slower and in more memory. To mend it, %s",
            trouble,
            CURE,
        )
        return trouble
    return None
