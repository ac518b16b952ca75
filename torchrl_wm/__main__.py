"""``python -m torchrl_wm`` is ``torchrl-wm``."""

from __future__ import annotations

import sys

from torchrl_wm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
