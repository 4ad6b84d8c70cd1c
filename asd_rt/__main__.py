"""`python -m asd_rt` is `asd-rt`."""

import sys

from asd_rt.cli import main

sys.exit(main())
