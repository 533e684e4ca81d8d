"""`python -m launcher.cli` is `launcher`."""

import sys

from launcher.cli import main

sys.exit(main())
