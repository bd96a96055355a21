"""Addresses of this machine to listen at."""

import socket


def listen(host: str, port: int) -> socket.socket:
    """
    Args:
        host (`str`): Address or name of this machine.
        port (`int`): Port; 0 takes a free one.

    Raises:
        OSError: if there is no such address here, or its port is taken.
    """
    host = host.removeprefix("[").removesuffix("]")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:  # what is no host name at all is an error of its encoding
        raise OSError(f"cannot listen at {host!r}, port {port}: {error}") from error


__all__ = ["listen"]
