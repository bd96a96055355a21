"""Images behind URLs: `data:` always, `http:` and `https:` if they are allowed, and then of public addresses only."""

import asyncio
import base64
import binascii
import ipaddress
import socket
from collections.abc import Callable

import httpx2
from fastapi import HTTPException


MAX_REDIRECTS = 3
TIMEOUT = 10.0
REDIRECTS = (301, 302, 303, 307, 308)


def is_public(address: str) -> bool:
    """
    Whether an IP address is one of the public internet: not private, loopback, link-local, multicast, reserved, nor
    an IPv6 address that stands for such an IPv4 address.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # addresses of IPv4 behind NAT64
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if not all(part.is_global and not part.is_multicast for part in inner if part is not None):
            return False
        if ip.ipv4_mapped is not None:
            return True
    return ip.is_global and not ip.is_multicast


class ImageLoader:
    """
    Reads the bytes of images.

    Args:
        allow_remote (`bool`):
            Whether `http:` and `https:` URLs are fetched.
        max_bytes (`int`):
            Bytes of a remote image.
        is_allowed (`Callable[[str], bool]`, *optional*):
            Which IP addresses may be connected to; those of the public internet by default.
    """

    def __init__(self, allow_remote: bool, max_bytes: int, is_allowed: Callable[[str], bool] = is_public):
        self.allow_remote, self.max_bytes, self.is_allowed = allow_remote, max_bytes, is_allowed

    async def load(self, url: str) -> bytes:
        """
        Raises:
            HTTPException: if the URL is no image, remote and not allowed, or cannot be fetched.
        """
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            return decode_data_url(url)
        if scheme not in ("http", "https"):
            raise HTTPException(400, "image_url must be a data: URL with the image in base64, or an http(s) URL")
        if not self.allow_remote:
            raise HTTPException(
                400, "this server does not fetch remote images: send the image as a data: URL in base64"
            )
        try:
            async with asyncio.timeout(TIMEOUT):
                return await self._fetch(url)
        except (TimeoutError, httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise HTTPException(400, f"the image at {shorten(url)} cannot be fetched") from error

    async def _fetch(self, url: str) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            target = httpx2.URL(url)
            # The address that was checked is the one that is connected to: a name may resolve otherwise next time
            address = await self._resolve(target)
            request = httpx2.Request(
                "GET",
                target.copy_with(host=address, userinfo=b""),
                headers={"Host": target.netloc.decode("ascii"), "Accept": "image/*"},
                extensions={"sni_hostname": target.host, "timeout": httpx2.Timeout(TIMEOUT).as_dict()},
            )
            async with httpx2.AsyncClient(trust_env=False) as client:
                response = await client.send(request, stream=True, follow_redirects=False)
                if response.status_code in REDIRECTS and "location" in response.headers:
                    url = str(target.join(response.headers["location"]))
                    continue
                if response.status_code != 200:
                    raise HTTPException(400, f"the image at {shorten(url)} answers {response.status_code}")
                return await self._read(response, url)
        raise HTTPException(400, f"the image at {shorten(url)} is behind more than {MAX_REDIRECTS} redirects")

    async def _resolve(self, url: httpx2.URL) -> str:
        if url.scheme not in ("http", "https") or not url.host:
            raise HTTPException(400, f"{shorten(str(url))} is not an http(s) URL")
        port = url.port or (443 if url.scheme == "https" else 80)
        found = await asyncio.get_running_loop().getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
        addresses = [str(info[4][0]) for info in found]
        if not addresses or not all(map(self.is_allowed, addresses)):
            raise HTTPException(400, f"{shorten(str(url))} is not a public address")
        return addresses[0]

    async def _read(self, response: httpx2.Response, url: str) -> bytes:
        parts, size = [], 0
        async for part in response.aiter_bytes():
            parts.append(part)
            size += len(part)
            if size > self.max_bytes:
                raise HTTPException(413, f"the image at {shorten(url)} is larger than {self.max_bytes:,} bytes")
        return b"".join(parts)


def decode_data_url(url: str) -> bytes:
    """
    Raises:
        HTTPException: if it is not base64.
    """
    head, comma, payload = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise HTTPException(400, "a data: URL of an image is written data:image/png;base64,...")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise HTTPException(400, f"the data: URL of an image is not base64: {error}") from error


def shorten(url: str) -> str:
    return url if len(url) <= 100 else f"{url[:97]}..."


__all__ = ["ImageLoader", "is_public"]
