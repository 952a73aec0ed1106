"""What a trained model has learnt: `analyze.analyze_run` for one run, `compare.compare_runs` for several."""
