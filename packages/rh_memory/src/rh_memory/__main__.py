"""`python -m rh_memory`."""

from rh_memory.cli import main

raise SystemExit(main())
