"""The environment, as the pipeline reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.errors import ConfigurationError
from pipeline.settings import Settings, redact, settings


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for field in Settings.model_fields:
        monkeypatch.delenv(f"PIPELINE_{field.upper()}", raising=False)
    monkeypatch.delenv("GATEWAY_PORT", raising=False)
    monkeypatch.delenv("DASHBOARD_PORT", raising=False)
    monkeypatch.chdir(tmp_path)
    settings.cache_clear()
    yield
    settings.cache_clear()


def test_without_any_variable_everything_is_on_this_machine() -> None:
    assert settings().redis_url == "redis://127.0.0.1:6379/0"
    assert (settings().gateway_host, settings().gateway_port) == ("127.0.0.1", 8000)
    assert (settings().dashboard_host, settings().dashboard_port) == ("127.0.0.1", 8050)
    assert settings().data_dir == Path(".pipeline")
    assert settings() is settings()


def test_the_environment_wins_over_the_file_and_a_blank_line_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("GATEWAY_PORT=8001\nDASHBOARD_PORT=8051\nPIPELINE_TOKEN=\nSOMEBODY_ELSES=1\n")
    monkeypatch.setenv("GATEWAY_PORT", "8002")
    assert settings().gateway_port == 8002
    assert settings().dashboard_port == 8051
    assert settings().token is None


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("GATEWAY_PORT", "eighty"),
        ("DASHBOARD_PORT", "65536"),
        ("PIPELINE_PREFETCH_BYTES", "-1"),
        ("PIPELINE_REDIS_URL", "http://127.0.0.1"),
        ("PIPELINE_REDIS_URL", "redis://127.0.0.1:99999"),
        ("PIPELINE_REDIS_URL", "redis://127.0.0.1:6379/zero"),
        ("PIPELINE_LOG_LEVEL", "loud"),
        ("PIPELINE_METRICS_INTERVAL", "0"),
        ("PIPELINE_TOKEN", "schlüssel"),
        ("PIPELINE_TOKEN", "one\ntwo"),
    ],
)
def test_a_bad_value_is_refused_by_its_variables_name(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=variable):
        settings()


def test_a_file_that_is_no_text_is_named() -> None:
    Path(".env").write_bytes(b"# Schl\xfcssel\nGATEWAY_PORT=8001\n")
    with pytest.raises(ConfigurationError, match=r"/\.env is not UTF-8 text: invalid start byte at byte 6"):
        settings()


def test_no_secret_shows_in_a_representation_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_TOKEN", "hush")
    monkeypatch.setenv("PIPELINE_REDIS_URL", "redis://me:hush@127.0.0.1/0")
    assert "hush" not in f"{settings()!r} {settings()}"
    assert settings().redis_url == "redis://me:hush@127.0.0.1/0"
    monkeypatch.setenv("PIPELINE_REDIS_URL", "ftp://me:hush@127.0.0.1/0")
    settings.cache_clear()
    with pytest.raises(ConfigurationError) as caught:
        settings()
    assert "hush" not in str(caught.value)
    monkeypatch.setenv("PIPELINE_REDIS_URL", "redis://me:hush/hush@127.0.0.1/0")
    with pytest.raises(ConfigurationError) as caught:
        settings()
    assert "hush" not in str(caught.value)


def test_the_template_names_every_setting() -> None:
    lines = (Path(__file__).parent.parent / ".env.example").read_text().splitlines()
    named = {line.partition("=")[0] for line in lines if line and not line.startswith("#")}
    assert named == {
        field.validation_alias or f"PIPELINE_{name.upper()}" for name, field in Settings.model_fields.items()
    }


def test_settings_do_not_change_under_a_running_process() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        settings().gateway_port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("redis://:secret@host:6379/0", "redis://:***@host:6379/0"),
        ("rediss://me:se:c@ret@host/1?ssl_cert_reqs=none", "rediss://me:***@host/1?ssl_cert_reqs=none"),
        ("unix://:secret@/run/redis.sock", "unix://:***@/run/redis.sock"),
        ("redis://host/0?db=1&password=secret", "redis://host/0?db=1&password=***"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert redact(url) == shown
