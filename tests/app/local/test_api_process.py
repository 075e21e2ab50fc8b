"""One of several API processes."""

from app.local.api_process import listen
from app.settings import Settings
from tests.servers import free_port


def test_each_process_listens_on_the_port_with_its_own_socket() -> None:
    settings = Settings(port=free_port())
    with listen(settings) as one, listen(settings) as other:
        assert one.getsockname() == other.getsockname() == ("127.0.0.1", settings.port)
