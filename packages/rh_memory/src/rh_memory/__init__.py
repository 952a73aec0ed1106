"""Mixture-density transformers with memory slots over the spacings of Riemann zeta zeros."""

__version__ = "0.1.0"
