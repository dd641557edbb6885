"""`python -m minima`: the same as the `minima` command."""

import sys

from minima.cli import main

if __name__ == "__main__":
    sys.exit(main())
