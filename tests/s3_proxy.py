"""A network that breaks, between boto3 and a real S3 server."""

import contextlib
import socket
import threading


class CuttingProxy:
    """Forwards TCP to the server, and cuts connections that carried `limit` bytes in one direction, `cuts` times in all."""

    def __init__(self, server: str, limit: int, cuts: int):
        self.server = ("127.0.0.1", int(server.rpartition(":")[2]))
        self.limit, self.cuts, self.made = limit, cuts, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                client, _ = self.socket.accept()
            except OSError:  # closed
                return
            server = socket.create_connection(self.server)
            for pair in ((client, server), (server, client)):
                threading.Thread(target=self.forward, args=pair, daemon=True).start()

    def forward(self, source, sink):
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                passed += len(data)
                if passed > self.limit and self.made < self.cuts:
                    self.made += 1
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
