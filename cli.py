"""Run `surgery` from a checkout: `python cli.py fapm --pre P --ft F`."""

import sys

from surgery.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
