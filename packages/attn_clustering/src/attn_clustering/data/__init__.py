"""Training data with known topics: micro-languages, their reference levels, orderings, and real text."""
