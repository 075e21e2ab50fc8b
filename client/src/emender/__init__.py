"""The client of Emender's HTTP API.

>>> from emender import Client
>>> with Client("http://127.0.0.1:8000", api_key="em_…") as client:
...     edit = client.edits.create("emoji", {"source": "dog", "destination": {"prompt": "robot"}})
...     client.edits.wait(edit.id)
...     version = client.checkpoints.apply("emoji", {"edits": "ready", "alias": "production"}).version
...     client.checkpoints.wait("emoji", version)
"""

from emender.client import Client
from emender.errors import EmenderError, Refused, Unreachable, WaitedInVain, WorkFailed

__version__ = "0.2.0"

__all__ = ["Client", "EmenderError", "Refused", "Unreachable", "WaitedInVain", "WorkFailed"]
