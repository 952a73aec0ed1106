"""IceCube neutrino direction reconstruction with transformers over Kaggle-format pulses."""

__version__ = "0.1.0"
