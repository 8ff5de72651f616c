"""`python -m darkmatter_ext`, the same as the command `darkmatter` (what torchrun starts)."""

import sys

from darkmatter_ext.cli import main

sys.exit(main())
