"""`python -m gauge_attn`."""

from gauge_attn.cli import main

raise SystemExit(main())
