"""`python -m growlib`."""

import sys

from growlib.cli import main

if __name__ == "__main__":
    sys.exit(main())
