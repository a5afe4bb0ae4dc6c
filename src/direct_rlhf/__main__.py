"""`python -m direct_rlhf`, the same as the command `direct-rlhf`."""

import sys

from direct_rlhf.cli import main

sys.exit(main())
