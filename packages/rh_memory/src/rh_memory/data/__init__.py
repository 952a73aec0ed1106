"""From zeros to what a model reads: unfolded spacings, splits, windows, and controls that hold no arithmetic."""
