"""minima: the best smaller language model that a large one can become."""

__version__ = "0.1.0"
