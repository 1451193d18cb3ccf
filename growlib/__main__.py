"""`python -m growlib`."""

import sys

from growlib.cli import main

sys.exit(main())
