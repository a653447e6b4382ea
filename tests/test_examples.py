"""Every example runs, is short, and prints what its readers are promised."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .programs import ROOT, finished

PRINTED = {
    "publish_readings.py": """\
attic: 20.0 °C
attic: 22.5 °C
attic: 22.7 °C
attic: 20.4 °C
attic: 17.7 °C
""",
    "anomaly_pipeline.py": """\
alert: boiler at 97.5 °C
alert: reactor at 450.0 °C
""",
    "matrix_product.py": """\
600 x 600 in 9 tiles, 0 computed again
mean of its first row: 4482.817, by numpy: 4482.817
""",
    "music.py": """\
the pipeline heard: Raga Vairabi - Pt. Ajoy Chakrabarty
a bare client heard: Raga Yaman - Kishori Amonkar
""",
    "request_reply.py": """\
84 / 12 = 7 remainder 0
97 / 10 = 9 remainder 7
request on channel 'example.divisions': nothing can be divided by zero
""",
    "search.py": """\
best: {'alpha': 0.1}, 0.967 after 133 epochs
forest: 0.951, as grown alone: True
speed-up: … ×
""",
    "serve_model.py": """\
[1.0, 5.0, 2.0, 0.0] → second 0.93
[0.0, 1.0, 2.0, 9.0] → fourth 1.00
""",
    "train_together.py": """\
the same weights: True
nine of ten are right: True
""",
    "tensors_batch.py": """\
hum: loudest at 50 Hz, Tensor(float32, shape=[257])
low E: loudest at 82 Hz, Tensor(float32, shape=[257])
low C: loudest at 64 Hz, Tensor(float32, shape=[257])
""",
}


@pytest.fixture
def url(valkey_url: str) -> str:
    """What examples print does not depend on the server."""
    return valkey_url


def examples() -> list[Path]:
    return sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", examples(), ids=lambda path: path.name)
def test_an_example_prints_what_is_promised(example: Path, url: str) -> None:
    result = finished(str(example), url=url, PYTHONPATH=str(ROOT))
    printed = re.sub(r"\d+\.\d+ ×", "… ×", result.stdout)  # a measured ratio; benchmarks judge those
    assert (printed, result.stderr, result.returncode) == (PRINTED[example.name], "", 0)


@pytest.mark.parametrize("example", examples(), ids=lambda path: path.name)
def test_an_example_is_shorter_than_forty_lines(example: Path) -> None:
    assert len(example.read_text().splitlines()) < 40
