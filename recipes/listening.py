"""Sockets that wait for requests, for the commands that serve something."""

import socket

from conversations.errors import ToolkitError

HOME = "127.0.0.1"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; 0 is any free port. Bound before anything slow begins, so that a taken port is said at
    once.

    Raises:
        ToolkitError: the port is out of range or taken, or the address is not one of this machine.
    """
    if not 0 <= port <= 65535:  # getaddrinfo would take it modulo 65536
        raise ToolkitError(f"--port is {port}; it must be from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()  # clients that come before the server runs are kept waiting
        except OSError:
            listener.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        host_said = "" if host == HOME else f"--host {host} "
        raise ToolkitError(f"{host_said}--port {port}: {error}; choose another") from error
    return listener
