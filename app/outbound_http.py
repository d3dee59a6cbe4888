"""Where webhooks and a judge's questions may go: to an address of the internet, found once, and connected to as found.

A name is resolved here and the connection made to that address, so that it cannot be resolved to another one in
between. Addresses of the operator's own network are refused, but for the hosts that a setting names.
"""

import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx2

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_UNICAST = ipaddress.ip_network("2000::/3")
"""All addresses of the internet that were ever handed out."""
CONNECT_SECONDS = 10.0


class HostRefused(Exception):
    """A URL that nothing is sent to, and why."""


@dataclass(frozen=True)
class Target:
    """A URL taken apart: `address` is what to connect to."""

    scheme: str
    host: str
    port: int
    path: str
    address: str

    @property
    def url(self) -> str:
        """The URL with the address in the host's place."""
        place = f"[{self.address}]" if ":" in self.address else self.address
        return f"{self.scheme}://{place}:{self.port}{self.path}"

    @property
    def host_header(self) -> str:
        name = f"[{self.host}]" if ":" in self.host else self.host
        return name if self.port == {"https": 443, "http": 80}[self.scheme] else f"{name}:{self.port}"

    def post(self, client: httpx2.Client, content: bytes, headers: dict[str, str]) -> httpx2.Request:
        """A request of `client` to the address that was checked, for the host that it was found by."""
        return client.build_request(
            "POST",
            self.url,
            content=content,
            headers={"Host": self.host_header, **headers},
            extensions={"sni_hostname": self.host},
        )


def new_client(timeout: float) -> httpx2.Client:
    """No redirects and no proxy of the environment: connections go to the address that was checked."""
    seconds = httpx2.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS))
    return httpx2.Client(timeout=seconds, trust_env=False, follow_redirects=False)


def find(url: str, private_hosts: tuple[str, ...], setting: str) -> Target:
    """Resolve `url`; `private_hosts` is what the operator gave as `setting`. Raises `Refused`."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise HostRefused("it is not a URL") from error
    host = parts.hostname or ""
    if parts.scheme not in ("https", "http") or not host:
        raise HostRefused("it must be an https:// URL")
    if parts.username or parts.password:
        raise HostRefused("it must not hold a user name or password")
    inside = host in {name.lower() for name in private_hosts}
    if parts.scheme == "http" and not inside:
        raise HostRefused("it must be an https:// URL")
    port = port or (443 if parts.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise HostRefused(f"the host '{host}' cannot be resolved") from error
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    if not inside and not all(is_public(ipaddress.ip_address(address)) for address in addresses):
        raise HostRefused(f"the host '{host}' is not on the public internet; {setting} allows hosts inside")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, host, port, path, addresses[0])


def is_public(address: Address) -> bool:
    """Whether an address is one of the internet, whatever it is wrapped in."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address not in _UNICAST:
            return False
    return address.is_global and not address.is_multicast
