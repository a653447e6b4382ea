"""`python -m publishers.jobs`."""

import sys

from .stream import main

sys.exit(main())
