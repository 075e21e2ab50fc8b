"""The clients read EMENDER_URL and EMENDER_API_KEY."""

import pytest

from emender import AsyncClient, Client, EmenderError


@pytest.mark.parametrize("kind", [Client, AsyncClient])
class TestEnvironment:
    def test_url_and_api_key_are_read_from_the_environment(
        self, kind: type[Client], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("EMENDER_URL", "https://emender.example/")
        monkeypatch.setenv("EMENDER_API_KEY", "em_a_b")
        client = kind()
        assert client.url == "https://emender.example"
        assert client._connection._http.headers["Authorization"] == "Bearer em_a_b"

    def test_arguments_take_precedence(self, kind: type[Client], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EMENDER_URL", "https://emender.example")
        monkeypatch.setenv("EMENDER_API_KEY", "em_a_b")
        client = kind("http://other.example", api_key="em_c_d")
        assert client.url == "http://other.example"
        assert client._connection._http.headers["Authorization"] == "Bearer em_c_d"

    def test_url_defaults_to_this_machine(self, kind: type[Client], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("EMENDER_URL", raising=False)
        assert kind(api_key="em_a_b").url == "http://127.0.0.1:8000"

    def test_missing_api_key_is_an_error(self, kind: type[Client], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("EMENDER_API_KEY", raising=False)
        with pytest.raises(EmenderError, match="Set EMENDER_API_KEY"):
            kind()
