"""An event-driven pub/sub pipeline framework for scalable machine learning, on Redis and Valkey."""

from .app import Pipeline
from .batching import Batch
from .channel import Channel
from .errors import (
    ChannelFull,
    EventTypeError,
    PipelineError,
    Reject,
    RequestFailed,
    RequestTimeout,
    Retry,
    ServerUnavailable,
)
from .events import Event
from .message import Message, Receipt, Reply
from .retries import RetryPolicy
from .tensors import Tensor

__all__ = [
    "Batch",
    "Channel",
    "ChannelFull",
    "Event",
    "EventTypeError",
    "Message",
    "Pipeline",
    "PipelineError",
    "Receipt",
    "Reject",
    "Reply",
    "RequestFailed",
    "RequestTimeout",
    "Retry",
    "RetryPolicy",
    "ServerUnavailable",
    "Tensor",
]
