"""Training as events: `join` a run from any loop, `replay` a recorded one, `Metrics` for loops that stand alone.

`python -m publishers.training` is the demonstration: workers that train the digit model.
"""

from .metrics import Metrics
from .recording import replay
from .run import Run, join

__all__ = ["Metrics", "Run", "join", "replay"]
