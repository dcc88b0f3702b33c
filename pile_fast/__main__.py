"""``python -m pile_fast``: what works on this machine (``pile-fast info``), or any other ``pile-fast`` command."""

import sys

from pile_fast.cli import main

if __name__ == "__main__":
    sys.argv[1:] = sys.argv[1:] or ["info"]
    sys.exit(main())
