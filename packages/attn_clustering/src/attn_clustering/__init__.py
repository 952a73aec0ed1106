"""Does the order of training data leave durable structure in attention heads?"""

__version__ = "0.1.0"
