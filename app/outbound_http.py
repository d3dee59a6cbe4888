"""Outbound requests of webhooks and judges. They may go only to addresses on the public internet.

A host name is resolved once, here, and the connection goes to that address. The name can therefore not resolve to
another address after the check. Addresses in the operator's own network are refused, except for hosts that a setting
names. An error does not tell whether an inner host exists.
"""

import ipaddress
import socket
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx2

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_UNICAST = ipaddress.ip_network("2000::/3")
"""The IPv6 block that holds every public address assigned so far."""
CONNECT_SECONDS = 10.0
LOOKUP_SECONDS = 5.0
"""The longest wait for a name server."""


class HostRefused(Exception):
    """The service refuses to send to a URL. The message says why.

    `unknown`: the host's address could not be found, which may be the name server's fault.
    """

    def __init__(self, message: str, *, unknown: bool = False) -> None:
        super().__init__(message)
        self.unknown = unknown


@dataclass(frozen=True)
class Target:
    """The parts of a URL. `address` is the IP address to connect to."""

    scheme: str
    host: str
    port: int
    path: str
    address: str

    @property
    def url(self) -> str:
        """The URL with the address in place of the host name."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{self.scheme}://{host}:{self.port}{self.path}"

    @property
    def host_header(self) -> str:
        name = f"[{self.host}]" if ":" in self.host else self.host
        return name if self.port == {"https": 443, "http": 80}[self.scheme] else f"{name}:{self.port}"

    def post(self, client: httpx2.Client, content: bytes, headers: dict[str, str]) -> httpx2.Request:
        """A POST to the checked address. The Host header and SNI carry the host name."""
        return client.build_request(
            "POST",
            self.url,
            content=content,
            headers={"Host": self.host_header, **headers},
            extensions={"sni_hostname": self.host},
        )


def new_client(timeout: float) -> httpx2.Client:
    """A client without redirects or the environment's proxies: it connects only to the checked address.

    It trusts the certificates that `SSL_CERT_FILE` or `SSL_CERT_DIR` names; without them, those of the system.
    """
    seconds = httpx2.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS))
    trusted = httpx2.create_ssl_context(trust_env=True)
    return httpx2.Client(timeout=seconds, verify=trusted, trust_env=False, follow_redirects=False)


def is_allowed(host: str, port: int, private_hosts: tuple[str, ...]) -> bool:
    """Whether the operator allows an inner host: by `name` at the ports 80 and 443, by `name:8080`, or by `name:*`."""
    name = (f"[{host}]" if ":" in host else host).lower()
    fitting = {f"{name}:{port}", f"{name}:*"} | ({name} if port in (80, 443) else set())
    return not fitting.isdisjoint(allowed.lower() for allowed in private_hosts)


def _addresses(host: str, port: int) -> list[str]:
    """The addresses of a host. Raises `OSError`, also for a name server that takes too long."""
    found: Future[list[str]] = Future()

    def look_up() -> None:
        try:
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.set_result([str(entry[4][0]).partition("%")[0] for entry in entries])
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=look_up, name="host name", daemon=True).start()
    return found.result(LOOKUP_SECONDS)


def resolve(url: str, private_hosts: tuple[str, ...], setting: str) -> Target:
    """Resolve and check `url`. The operator's `setting` allows `private_hosts`. Raises `HostRefused`."""
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
    port = port or (443 if parts.scheme == "https" else 80)
    is_private_host = is_allowed(host, port, private_hosts)
    if parts.scheme == "http" and not is_private_host:
        raise HostRefused("it must be an https:// URL")
    # One answer for a host inside and for one that does not exist: nobody can ask for the names of the own network.
    refusal = f"the host '{host}' is not found on the public internet; {setting} allows hosts inside, as HOST:PORT"
    try:
        addresses = _addresses(host, port)
    except (OSError, UnicodeError) as error:
        raise HostRefused(refusal, unknown=True) from error
    if not is_private_host and not all(is_public(ipaddress.ip_address(address)) for address in addresses):
        raise HostRefused(refusal)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, host, port, path, addresses[0])


def is_public(address: Address) -> bool:
    """Whether an address is on the public internet. An IPv6 address that wraps an IPv4 one is judged by that one."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address not in _UNICAST:
            return False
    return address.is_global and not address.is_multicast
