"""A TCP proxy whose connections are cut, delayed or refused."""

import socket
import threading
import time
from contextlib import suppress

from fhir_assets.cli.local_ports import find_free_port

_CHUNK = 65_536


class Proxy:
    """Forwards 127.0.0.1:``port`` to ``target``, another port of 127.0.0.1, which may change at any time.

    ``delay`` is the time in seconds that each chunk waits; while ``cut`` is true, connections are refused.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.delay = 0.0
        self._cut = False
        self._open: set[socket.socket] = set()
        self.port = find_free_port()
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    @property
    def cut(self) -> bool:
        """Whether the network is down. Cutting it ends all connections in the middle of what they send."""
        return self._cut

    @cut.setter
    def cut(self, value: bool) -> None:
        self._cut = value
        if value:
            self.break_connections()

    def break_connections(self) -> None:
        """End all connections."""
        for connection in [*self._open]:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop listening, and end all connections."""
        self._listener.close()
        self.cut = True

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            if self._cut:
                return
            with socket.create_connection(("127.0.0.1", self.target), timeout=10) as server:
                server.settimeout(None)
                self._open |= {client, server}
                try:
                    back = threading.Thread(target=self._copy, args=(server, client), daemon=True)
                    back.start()
                    self._copy(client, server)
                    back.join()
                finally:
                    self._open -= {client, server}

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while chunk := source.recv(_CHUNK):
                if self.delay:
                    time.sleep(self.delay)
                target.sendall(chunk)
        for end in (target, source):
            with suppress(OSError):
                end.shutdown(socket.SHUT_WR if end is target else socket.SHUT_RD)
