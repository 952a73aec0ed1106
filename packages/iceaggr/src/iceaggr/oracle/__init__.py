"""The information limit on simulated data: `run` fits events, the other modules are its likelihood and its climb."""
