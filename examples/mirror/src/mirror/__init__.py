"""Can one attention head read a line backwards? A whole experiment on lab_shared in under a hundred lines."""

__version__ = "0.1.0"
