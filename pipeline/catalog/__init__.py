"""The ML events and channels that publishers, subscribers and dashboards share, a file a subject.

Nothing in the core imports this.
"""

from .handwriting import (
    DIGIT_MODEL,
    DIGIT_PARAMETERS,
    DIGIT_SHAPE,
    INTENSITY,
    Digit,
    Prediction,
    digits,
    predictions,
)
from .matmul import (
    MatmulJob,
    MatmulResult,
    SystolicCycle,
    matmul_jobs,
    matmul_results,
    systolic_cycles,
)
from .rows import (
    Record,
    records,
)
from .serving import (
    Answer,
    Inputs,
    LoadModel,
    ModelStatus,
    Score,
    answers,
    model_loads,
    model_status,
    requests_of,
)
from .training import (
    Gradient,
    Round,
    TrainingMetrics,
    Weights,
    gradients,
    rounds,
    training_metrics,
    weights,
)

__all__ = [
    "Answer",
    "DIGIT_MODEL",
    "DIGIT_PARAMETERS",
    "DIGIT_SHAPE",
    "Digit",
    "Gradient",
    "INTENSITY",
    "Inputs",
    "LoadModel",
    "MatmulJob",
    "MatmulResult",
    "ModelStatus",
    "Prediction",
    "Record",
    "Round",
    "Score",
    "SystolicCycle",
    "TrainingMetrics",
    "Weights",
    "answers",
    "digits",
    "gradients",
    "matmul_jobs",
    "matmul_results",
    "model_loads",
    "model_status",
    "predictions",
    "records",
    "requests_of",
    "rounds",
    "systolic_cycles",
    "training_metrics",
    "weights",
]
