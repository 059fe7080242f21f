"""`python -m moe_lab` and `torchrun -m moe_lab`: the same as `moe-lab`."""

import sys

from moe_lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
