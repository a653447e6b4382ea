"""Matrix products as events: from a script (`multiply`), from the command line (`pipeline matmul`), and a stream of
random ones (`python -m publishers.jobs`)."""

from .asking import multiply
from .stream import job_events

__all__ = ["job_events", "multiply"]
