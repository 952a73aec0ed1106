"""`python -m iceaggr`, also what torchrun starts."""

from iceaggr.cli import main

raise SystemExit(main())
