"""What a trained model computes: attention statistics, probes, circuits, ablations, and comparisons over seeds."""
