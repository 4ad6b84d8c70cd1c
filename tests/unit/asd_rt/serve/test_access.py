"""Who may come in, and which hosts need a token."""

from __future__ import annotations

import pytest

from asd_rt.errors import ConfigError
from asd_rt.serve.access import access_of, is_loopback

TOKEN = "0123456789abcdef"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_this_machine_needs_no_token(host: str) -> None:
    assert is_loopback(host)
    assert access_of(host, None, []).token is None


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.4", "example.org", "127.0.0.1.example.org", ""]
)
def test_any_other_host_needs_one(host: str) -> None:
    with pytest.raises(ConfigError, match="needs a token: set ASD_RT_TOKEN"):
        access_of(host, None, [])
    assert access_of(host, TOKEN, []).host_names is None


@pytest.mark.parametrize(
    "token", ["", "short", "x" * 129, "with space 1234567", "umläut-0123456789"]
)
def test_tokens_fit_into_a_header(token: str) -> None:
    with pytest.raises(ConfigError, match="16 to 128 letters"):
        access_of("127.0.0.1", token, [])
