"""Attention as softmax(-KL/kappa) between Gaussian beliefs transported by SO(3) frames."""

__version__ = "0.1.0"
