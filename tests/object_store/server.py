"""A server that speaks S3, as a process of its own: prints its port, and ends with whoever started it.

``server.py moto`` is moto's, which keeps everything in memory; ``server.py localbucket DIRECTORY`` is a small one
over files, which has no metadata, deletes one object at a time and cannot list unfinished uploads; ``server.py lean``
is our own (``lean.py``), for measuring.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseServer
from typing import Any


def moto() -> tuple[BaseServer, int]:
    """Not started yet."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application, claiming = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def atomic(environ: Any, start_response: Any) -> Any:
        """moto looks and then stores; between the two another claim may come. S3 does not let it."""
        if "HTTP_IF_NONE_MATCH" not in environ:
            return application(environ, start_response)
        with claiming:
            return list(application(environ, start_response))

    server = make_server("127.0.0.1", 0, atomic, threaded=True)
    return server, server.port


def localbucket(directory: str) -> tuple[BaseServer, int]:
    """Not started yet."""
    from localbucket import S3Handler

    S3Handler.data_root = Path(directory)
    server = ThreadingHTTPServer(("127.0.0.1", 0), S3Handler)
    return server, server.server_port


def lean() -> tuple[BaseServer, int]:
    """Not started yet."""
    sys.path.append(str(Path(__file__).parents[2]))
    from tests.object_store.lean import S3Handler, new_server

    server, _ = new_server(S3Handler)
    return server, server.server_port


def main() -> None:
    """Serves until stdin is closed."""
    logging.disable(logging.ERROR)
    servers: dict[str, Callable[..., tuple[BaseServer, int]]] = {"moto": moto, "localbucket": localbucket, "lean": lean}
    server, port = servers[sys.argv[1]](*sys.argv[2:])
    print(port, flush=True)  # noqa: T201  # that is how it is told
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
