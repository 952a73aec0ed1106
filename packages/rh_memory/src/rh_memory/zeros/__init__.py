"""Zeros of the Riemann zeta function: computed, verified, stored, or read from published tables."""
