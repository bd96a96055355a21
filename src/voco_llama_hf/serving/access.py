"""Who is answered: requests to this server by its own name, with a key if there is one."""

import ipaddress
import secrets
from collections.abc import Sequence
from urllib.parse import urlsplit

from .limits import App, Receive, Scope, Send, refuse


OPEN_ROUTES = ("/health",)


class AccessMiddleware:
    """
    ASGI layer that refuses requests without a key, and those whose `Host` header names another server: a page in a
    browser on this machine can have its own name point here, and would read the answers.

    Args:
        app (`Callable`): The application behind it.
        allowed_hosts (`Sequence[str]`): Names that are answered, besides addresses and `localhost`; `"*"` is any.
        api_keys (`Sequence[str]`): Keys of which a request must bring one; without any, none is asked for.
    """

    def __init__(self, app: App, allowed_hosts: Sequence[str] = (), api_keys: Sequence[str] = ()):
        self.app = app
        self.allowed_hosts = {name.lower() for name in ("localhost", *allowed_hosts)}
        self.api_keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            host = headers.get(b"host", b"").decode("latin-1")
            if not self._is_allowed(host):
                return await refuse(send, 400, f"{host!r:.100} is not a name of this server: see --allowed-host")
            if scope["path"] not in OPEN_ROUTES and not self._has_key(headers.get(b"authorization", b"")):
                return await refuse(send, 401, "a key of this server is needed: Authorization: Bearer KEY")
        await self.app(scope, receive, send)

    def _is_allowed(self, host: str) -> bool:
        if "*" in self.allowed_hosts:
            return True
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name.removesuffix(".") in self.allowed_hosts:
                return True
            ipaddress.ip_address(name)  # nobody's name can point to an address in its own place
        except ValueError:
            return False
        return True

    def _has_key(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        # All are looked at: how long it takes tells nothing
        matches = [secrets.compare_digest(key.strip(), known) for known in self.api_keys]
        return not self.api_keys or (scheme.lower() == b"bearer" and any(matches))


__all__ = ["AccessMiddleware"]
