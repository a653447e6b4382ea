"""`python -m publishers.training`."""

import sys

from .command_line import main

sys.exit(main())
