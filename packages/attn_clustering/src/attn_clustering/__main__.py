"""`python -m attn_clustering`."""

from attn_clustering.cli import main

raise SystemExit(main())
