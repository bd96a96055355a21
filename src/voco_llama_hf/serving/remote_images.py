"""Images behind URLs: in the URL itself, or remote if that is allowed, and then at public addresses only."""

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


# IANA's registries of special-purpose addresses, as of 2026; what Python calls global depends on its version
IPV4_SPECIAL = [
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",
    )
]
IPV6_PUBLIC = ipaddress.IPv6Network("2000::/3")
IPV6_SPECIAL = [
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # Teredo, which holds an address of IPv4, and others of protocols
        "2001:db8::/32",
        "2002::/16",  # 6to4, which holds an address of IPv4
        "3fff::/20",
    )
]
# The last 32 bits are an address of IPv4: as a socket that takes both writes it, and behind NAT64
IPV4_IN_IPV6 = [ipaddress.IPv6Network("::ffff:0:0/96"), ipaddress.IPv6Network("64:ff9b::/96")]


def is_public(address: str) -> bool:
    """
    Whether an IP address is one of the public internet: what is set aside for anything else is not, nor what stands
    for such an address in another protocol.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if not any(ip in network for network in IPV4_IN_IPV6):
            return ip in IPV6_PUBLIC and not any(ip in network for network in IPV6_SPECIAL)
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return not any(ip in network for network in IPV4_SPECIAL)


class ImageLoader:
    """
    Fetches the bytes of images.

    Args:
        allow_remote (`bool`):
            Whether `http:` and `https:` URLs are fetched.
        is_allowed (`Callable[[str], bool]`, *optional*):
            Which IP addresses may be connected to; those of the public internet by default.
    """

    def __init__(self, allow_remote: bool, is_allowed: Callable[[str], bool] = is_public):
        self.allow_remote, self.is_allowed = allow_remote, is_allowed
        # Reading the certificates takes long, and a client of its own for each fetch shares no connection with others
        self._certificates = httpx2.create_ssl_context() if allow_remote else True

    async def load(self, url: str, max_bytes: int) -> bytes:
        """
        The bytes of an image.

        Args:
            url (`str`): Where it is.
            max_bytes (`int`): Bytes that a remote image may have.

        Raises:
            HTTPException: if the URL is no image, remote and not allowed, or cannot be fetched.
        """
        if url.partition(":")[0].lower() not in ("http", "https"):
            raise HTTPException(400, "image_url must be a data: URL with the image in base64, or an http(s) URL")
        if not self.allow_remote:
            raise HTTPException(
                400, "this server does not fetch remote images: send the image as a data: URL in base64"
            )
        try:
            async with asyncio.timeout(TIMEOUT):
                return await self._fetch(url, max_bytes)
        # ValueError: hosts and ports that no resolver takes
        except (TimeoutError, httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, OverflowError) as error:
            raise HTTPException(400, f"the image at {shorten(url)} cannot be fetched") from error

    async def _fetch(self, url: str, max_bytes: int) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            target = httpx2.URL(url)
            # The address that was checked is the one that is connected to: a name may resolve otherwise next time
            address = await self._resolve(target)
            request = httpx2.Request(
                "GET",
                target.copy_with(host=address, userinfo=b""),
                headers={"Host": target.netloc.decode("ascii"), "Accept": "image/*", "Accept-Encoding": "identity"},
                extensions={"sni_hostname": target.host, "timeout": httpx2.Timeout(TIMEOUT).as_dict()},
            )
            async with httpx2.AsyncClient(trust_env=False, verify=self._certificates) as client:
                response = await client.send(request, stream=True, follow_redirects=False)
                if response.status_code in REDIRECTS and "location" in response.headers:
                    url = str(target.join(response.headers["location"]))
                    continue
                if response.status_code != 200:
                    raise HTTPException(400, f"the image at {shorten(url)} answers {response.status_code}")
                # Images are compressed as they are; what a few bytes are decoded to can be gigabytes
                if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
                    raise HTTPException(400, f"the image at {shorten(url)} comes in a content encoding")
                return await read(response, url, max_bytes)
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


async def read(response: httpx2.Response, url: str, max_bytes: int) -> bytes:
    """
    Raises:
        HTTPException: if there are more bytes.
    """
    parts, size = [], 0
    async for part in response.aiter_raw():
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            raise HTTPException(413, f"the image at {shorten(url)} is larger than {max_bytes:,} bytes")
    return b"".join(parts)


def is_data_url(url: str) -> bool:
    return url[:5].lower() == "data:"


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


__all__ = ["ImageLoader", "decode_data_url", "is_data_url", "is_public"]
