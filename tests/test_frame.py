"""Events, tensors and frames: what goes in comes out, and nothing hostile gets further than a named error."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from pydantic import Field, ValidationError

from pipeline import Channel, Event, EventTypeError, Tensor
from pipeline.errors import ConfigurationError, FrameError, FrameInvalid, FrameTruncated, FrameVersionError
from pipeline.frame import Codec, Invalid, preview
from pipeline.tensors import DTYPES


class Rich(Event):
    name: str
    value: float
    raw: bytes = b""
    tags: list[str] = Field(default_factory=list)
    window: Tensor | None = None


codec: Codec[Rich] = Codec(Channel("rich", Rich))

dtypes = st.sampled_from([name for name in DTYPES if name != "bfloat16"])
arrays = dtypes.flatmap(
    lambda name: npst.arrays(np.dtype(name), npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)
tensors = arrays.map(Tensor) | st.integers(0, 5).map(lambda n: Tensor(torch.arange(n).to(torch.bfloat16)))
events = st.builds(
    Rich,
    name=st.text(),
    value=st.floats(),
    raw=st.binary(max_size=40),
    tags=st.lists(st.text(max_size=5), max_size=3),
    window=st.none() | tensors,
)


def encode(many: list[Rich], **header: Any) -> bytes:
    return codec.encode(many, **{"source": "s", "sequence": 7, "time": 1.5, **header})


@given(st.lists(events, min_size=1, max_size=6), st.data())
def test_every_event_comes_back_as_it_went(many: list[Rich], data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.none() | st.text(max_size=5), min_size=len(many), max_size=len(many)))
    frame = codec.decode(encode(many, keys=keys, attempt=3), count=len(many))
    assert [event.model_dump_json() for event in frame.events] == [event.model_dump_json() for event in many]  # NaN too
    assert [event.window for event in frame.events] == [event.window for event in many]
    assert [frame.key(index) for index in range(len(many))] == keys
    assert [frame.id(index) for index in range(len(many))] == [f"s:{7 + index}" for index in range(len(many))]
    assert (frame.header.attempt, frame.invalid) == (3, [])


@settings(max_examples=300)
@given(st.lists(events, min_size=1, max_size=3), st.data())
def test_damage_is_a_named_error_or_another_readable_frame(many: list[Rich], data: st.DataObject) -> None:
    frame = bytearray(encode(many))
    if data.draw(st.booleans()):
        frame = frame[: data.draw(st.integers(0, len(frame) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(FrameError):
        codec.decode(bytes(frame), count=len(many))


@given(st.binary(max_size=200))
def test_noise_is_a_named_error_on_live_channels_too(noise: bytes) -> None:
    for read in (codec.decode, codec.decode_live):
        with pytest.raises(FrameError):
            read(noise + b"\xff")
    preview(noise)


@pytest.mark.parametrize(
    ("frame", "error", "reason"),
    [
        (b"", FrameTruncated, "empty"),
        (b'{"pipeline":1,"da', FrameTruncated, "EOF"),
        (b"\x00PLF\x01", FrameTruncated, "5 bytes"),
        (b"\x00PLF\x01\0\0\0" + b"\xff" * 12, FrameTruncated, "promises"),
        (b'{"pipeline":2,"data":[]}', FrameVersionError, "version 2"),
        (b"\x00PLF\x09" + bytes(15), FrameVersionError, "version 9"),
        (b"[]", FrameInvalid, '"data"'),
        (b'{"pipeline":1,"keys":["a"],"data":[]}', FrameInvalid, "1 keys for 0 events"),
        (b'{"pipeline":1,"sequence":"x","data":[]}', FrameInvalid, "sequence"),
        (b'{"pipeline":1,"sequence":-1,"data":[]}', FrameInvalid, "sequence"),
        (b'{"pipeline":1,"sequence":1000000000000000000000000,"data":[]}', FrameInvalid, "sequence"),
        (b'{"pipeline":1,"attempt":-1000000,"data":[]}', FrameInvalid, "attempt"),
        (b'{"pipeline":1,"time":1e300,"data":[]}', FrameInvalid, "time"),
        (b'{"pipeline":1,"times":[NaN],"data":[]}', FrameInvalid, "times"),
        (b'{"pipeline":1,"due":1e308,"data":[]}', FrameInvalid, "due"),
        (b'{"pipeline":1,"reply":"somebodys:list","data":[]}', FrameInvalid, "reply"),
    ],
)
def test_what_is_wrong_is_said(frame: bytes, error: type[FrameError], reason: str) -> None:
    with pytest.raises(error, match=reason):
        codec.decode(frame)


def test_a_frame_with_another_count_than_promised_is_refused() -> None:
    with pytest.raises(FrameInvalid, match="promises 3 events, its frame holds 1"):
        codec.decode(encode([Rich(name="a", value=1)]), count=3)


def test_one_bad_event_among_good_ones_is_marked_and_keeps_its_reason() -> None:
    good = encode([Rich(name="a", value=1), Rich(name="b", value=2)])
    frame = codec.decode(good.replace(b'"value":2.0', b'"value":"two"'), count=2)
    bad = frame.events[1]
    assert frame.invalid == [1]
    assert isinstance(bad, Invalid)
    assert "value: Input should be a valid number" in bad.reason
    again: Codec[Any] = codec
    assert preview(again.reencode(frame, 1, attempt=2)) == [{**bad.value}]


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ('["float32",[2],64]', "outside the frame"),
        ('["float32",[2],-8]', "outside the frame"),
        ('["float32",[281474976710655],0]', "outside the frame"),
        ('["object",[2],0]', "unknown tensor dtype"),
        ('["float32",[-1],0]', "shape"),
        ('["float32",2,0]', "shape"),
        ('"x"', "reference"),
    ],
)
def test_a_tensor_that_lies_about_itself_is_refused(reference: str, reason: str) -> None:
    frame = encode([Rich(name="a", value=1, window=Tensor(np.zeros(2, np.float32)))])
    true = b'["float32",[2],0]'
    lie = reference.encode().ljust(len(true)) if len(reference) <= len(true) else reference.encode()
    text = frame.replace(true, lie)
    if len(lie) != len(true):  # the prefix must tell the new length, the padding keep its alignment
        start = frame.index(b"{")
        length = int.from_bytes(frame[8:12], "little") + len(lie) - len(true)
        body = text[start : start + length]
        body += bytes(-(20 + length) % 64)
        text = frame[:8] + length.to_bytes(4, "little") + frame[12:20] + body + frame[-64:]
    decoded = codec.decode(text, count=1)
    assert decoded.invalid == [0]
    assert isinstance(decoded.events[0], Invalid)
    assert reason in decoded.events[0].reason


@given(arrays)
def test_tensors_share_memory_and_refuse_to_be_written(array: np.ndarray[Any, Any]) -> None:
    frame = encode([Rich(name="a", value=1, window=Tensor(array))])
    event = codec.decode(frame).events[0]
    assert isinstance(event, Rich)
    assert event.window is not None
    out = np.asarray(event.window)
    np.testing.assert_array_equal(out, array)
    assert out.dtype == array.dtype
    assert not out.flags.writeable
    if out.nbytes:
        assert np.shares_memory(out, np.frombuffer(frame, np.uint8))
        assert torch.as_tensor(event.window).data_ptr() == out.ctypes.data


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.complex64])
def test_torch_tensors_come_back_as_torch_tensors(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).reshape(2, 3).T.to(dtype)
    event = codec.decode(encode([Rich(name="a", value=1, window=Tensor(tensor))])).events[0]
    assert isinstance(event, Rich)
    back = torch.as_tensor(event.window)
    assert back.dtype == dtype
    assert torch.equal(back, tensor)


def test_tensors_in_json_are_lists_or_base64_and_say_what_is_wrong() -> None:
    assert np.asarray(codec.parse('{"name":"a","value":1,"window":[[1,2],[3,4.5]]}').window).dtype == np.float32
    event = Rich(name="a", value=1, window=Tensor(np.arange(3)))
    assert codec.parse(event.model_dump_json()) == event
    for bad in (
        "[[1],[2,3]]",
        '["a"]',
        '{"dtype":"int8","shape":[9],"data":"AA=="}',
        '{"dtype":"int8"}',
        '{"$tensor":[]}',
    ):
        with pytest.raises(ValidationError):
            codec.parse(f'{{"name":"a","value":1,"window":{bad}}}')
    with pytest.raises(TypeError, match="cannot travel"):
        Tensor(np.array(["text"]))


def test_events_are_frozen_exact_and_compared_by_value() -> None:
    event = Rich(name="a", value=1, window=Tensor(np.arange(3)))
    assert event == Rich(name="a", value=1, window=Tensor(torch.arange(3)))
    assert event != Rich(name="a", value=1, window=Tensor(np.arange(3, dtype=np.int32)))
    with pytest.raises(ValidationError):
        event.name = "b"
    with pytest.raises(ValidationError, match="Extra inputs"):
        Rich(name="a", value=1, other=2)  # type: ignore[call-arg]

    class More(Rich):
        extra: int = 0

    with pytest.raises(EventTypeError, match="lose its own fields"):
        codec.check([More(name="a", value=1)])


@pytest.mark.parametrize(
    "bad",
    [
        {"name": "pipeline:x"}, {"name": ""}, {"name": "a b"}, {"type": int}, {"frame": 0}, {"partitions": 0},
        {"overflow": "explode"}, {"capacity": 0}, {"keep": -1}, {"durable": False, "fsync": True}, {"reply": int},
    ],
)  # fmt: skip
def test_a_channel_that_cannot_work_says_why(bad: dict[str, Any]) -> None:
    name, kind = bad.pop("name", "a"), bad.pop("type", Rich)
    with pytest.raises(ConfigurationError, match=r"channel|Channel"):
        Channel(name, kind, **bad)


def test_importing_the_framework_does_not_import_torch() -> None:
    code = "import sys, pipeline, pipeline.cli, pipeline.catalog; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_every_module_exports_is_there_and_sorted() -> None:
    import importlib
    import pkgutil

    import pipeline

    assert pipeline.__all__ == sorted(pipeline.__all__)
    for info in pkgutil.walk_packages(pipeline.__path__, "pipeline."):
        if info.name == "pipeline.__main__":
            continue
        module = importlib.import_module(info.name)
        names = module.__all__
        assert len(names) == len(set(names)), info.name
        assert all(hasattr(module, name) for name in names), info.name
