"""`python -m distri`: the same as the command, for `torchrun -m distri run`."""

import sys

from distri.cli import main

if __name__ == "__main__":
    sys.exit(main())
