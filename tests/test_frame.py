"""Events, tensors and frames: what goes in comes out, and nothing hostile gets further than a named error."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from pydantic import BaseModel, ConfigDict, Field, StrictFloat, ValidationError, computed_field

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


@pytest.mark.parametrize("value", ["5", '"hello"', "[1]", "NaN"])
def test_an_event_that_is_no_object_is_written_again_as_it_was(value: str) -> None:
    text = f'{{"pipeline":1,"data":[{{"name":"a","value":1}},{value}]}}'.encode()
    for kind in (Rich, dict):
        reader: Codec[Any] = Codec(Channel("c", kind))
        frame = reader.decode(text)
        assert frame.invalid == [1]
        again = reader.reencode(frame, 1, attempt=2)
        assert again.endswith(f',"data":[{value}]}}'.encode())
        assert reader.decode(again).invalid == [0]


class Loose(Event):
    mixed: int | float | bool
    text: float | str
    any: Any
    nested: dict[str, bool | int | float | str | None]


class Exact(Event):
    model_config = ConfigDict(strict=True)
    value: float


class Partly(Event):
    value: StrictFloat


@given(st.floats())
def test_nan_and_infinity_are_kept_whatever_the_field_allows(number: float) -> None:
    loose = Loose(mixed=number, text=number, any=[number], nested={"a": number})
    for event in (loose, Exact(value=number), Partly(value=number), {"a": number}):
        reader: Codec[Any] = Codec(Channel("floats", type(event)))
        frame = reader.decode(reader.encode([event], source="s", sequence=1, time=0.0))
        assert repr(frame.events) == repr([event])
        json.loads(json.dumps(reader.to_json(event)), parse_constant=pytest.fail)  # what browsers see is JSON


def test_aliases_are_the_names_in_json() -> None:
    class Inner(BaseModel):
        y: int = Field(alias="Y")

    class Aliased(Event):
        x: int = Field(alias="X")
        z: int = Field(default=0, validation_alias="Z")
        inner: Inner

    reader = Codec(Channel("aliased", Aliased))
    event = Aliased(X=1, Z=2, inner=Inner(Y=3))
    frame = reader.encode([event], source="s", sequence=1, time=0.0)
    assert frame.endswith(b'"data":[{"X":1,"z":2,"inner":{"Y":3}}]}')
    assert reader.decode(frame).events == [event]
    assert reader.parse('{"X":1,"Z":2,"inner":{"Y":3}}') == event


def test_a_type_whose_fields_would_be_lost_is_refused_with_its_channel() -> None:
    class Excluded(Event):
        x: int = Field(default=0, exclude=True)

    class Computed(Event):
        @computed_field  # type: ignore[prop-decorator]
        @property
        def y(self) -> int:
            return 1

    class Split(Event):
        z: int = Field(validation_alias="a", serialization_alias="b")

    class Nested(Event):
        many: list[Excluded]

    for kind, reason in (
        (Excluded, "Excluded.x is excluded"),
        (Computed, "Computed.y is computed"),
        (Split, "Split.z is written as 'b' and read as 'a'"),
        (Nested, "Excluded.x is excluded"),
    ):
        with pytest.raises(ConfigurationError, match=f"channel 'lossy': {reason}"):
            Codec(Channel("lossy", kind))


def test_a_nested_subclass_is_refused_as_it_would_lose_its_fields() -> None:
    class Base(Event):
        a: int = 0

    class Derived(Base):
        b: int = 0

    class Outer(Event):
        one: Base
        many: list[Base] = Field(default_factory=list)

    assert Outer(one=Base(a=1), many=[Base()]).one.a == 1
    with pytest.raises(ValidationError, match=r"(?s)one\.b.*Extra inputs.*many\.0\.b"):
        Outer(one=Derived(), many=[Derived()])


def test_a_tensor_may_be_a_default() -> None:
    class Padded(Event):
        pad: Tensor = np.zeros(3)  # type: ignore[assignment]

    assert Padded() == Padded(pad=Tensor(np.zeros(3)))


def test_what_cannot_be_written_is_an_error_that_says_so() -> None:
    for event, header in (
        (Rich.model_construct(name="\ud800", value=1.0), {}),
        (Rich(name="a", value=1), {"keys": ["\ud800"]}),
        (Rich(name="a", value=1), {"headers": [{"a": object()}]}),
    ):
        with pytest.raises(EventTypeError, match="channel 'rich'"):
            encode([event], **header)
    plain = Codec(Channel("plain", dict))
    with pytest.raises(EventTypeError, match="channel 'plain'"):
        plain.encode([{"a": object()}], source="s", sequence=1, time=0.0)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_torch_writes_in_place_is_not_in_the_retry(dtype: torch.dtype) -> None:
    event = Rich(name="a", value=1, window=Tensor(torch.ones(4, dtype=dtype)))
    frame = codec.decode(encode([event]))
    received: Any = frame.events[0]
    for _ in range(2):
        torch.as_tensor(received.window).add_(1)
    assert torch.as_tensor(received.window).tolist() == [3, 3, 3, 3]
    assert codec.decode(codec.reencode(frame, 0, attempt=2)).events == [event]


class Plain(torch.Tensor):
    """Whose module is not torch."""


def test_torch_tensors_that_are_views_or_ones_own_are_resolved() -> None:
    complex_ = torch.complex(torch.ones(2), torch.ones(2))
    for given_, wanted in (
        (complex_.conj(), [1 - 1j] * 2),
        (torch._neg_view(torch.ones(2)), [-1, -1]),
        (torch.ones(2, requires_grad=True).as_subclass(Plain), [1, 1]),
    ):
        assert Tensor(given_).tolist() == wanted


@pytest.mark.parametrize("bad", [torch.eye(2).to_sparse(), torch.empty(2, device="meta"), np.ones([1] * 33)])
def test_a_tensor_that_cannot_travel_is_refused_when_it_is_made(bad: Any) -> None:
    with pytest.raises(TypeError, match="cannot travel"):
        Tensor(bad)
    with pytest.raises(ValidationError, match="cannot travel"):
        Rich(name="a", value=1, window=bad)


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
        "[1e300]",
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
