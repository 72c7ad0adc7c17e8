"""`https:` sources, fetched so that a URL cannot make the server read its own network.

Each host is resolved here, all its addresses are judged, and the connection goes to the very
address that was judged; so a name that resolves otherwise a moment later changes nothing. Redirects
are followed by hand, and judged likewise. Proxies of the environment are not used: they would
connect somewhere by themselves.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Final

import httpx

from loraplex_server.adapters.errors import SourceFailed, SourceForbidden

_MAX_REDIRECTS: Final = 5
_TIMEOUT: Final = httpx.Timeout(30.0)
_PORTS: Final = {"https": 443, "http": 80}


def read_https(url: str, *, allow_private: bool) -> Generator[bytes]:
    """Yield the content of a URL.

    Raises:
        SourceForbidden: it, or where it redirects to, is on a private address or not encrypted.
        SourceFailed: it cannot be fetched.
    """
    try:
        with httpx.Client(trust_env=False, timeout=_TIMEOUT) as client:
            for _ in range(_MAX_REDIRECTS + 1):
                with _get(client, httpx.URL(url), allow_private) as response:
                    if not response.has_redirect_location:
                        yield from _content(response)
                        return
                    url = str(
                        response.request.extensions["asked"].join(response.headers["location"])
                    )
            raise SourceFailed(f"the source redirects more than {_MAX_REDIRECTS} times")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise SourceFailed(f"the source cannot be fetched: {error}") from error


@contextmanager
def _get(client: httpx.Client, url: httpx.URL, allow_private: bool) -> Iterator[httpx.Response]:
    if url.scheme not in _PORTS or (url.scheme == "http" and not allow_private):
        raise SourceForbidden(f"the source leads to {url.scheme}:, which is not encrypted")
    port = url.port or _PORTS[url.scheme]
    address = judge_host(url.host, port, allow_private=allow_private)
    request = client.build_request(
        "GET",
        url.copy_with(host=address),
        headers={"host": url.netloc.decode("ascii"), "accept-encoding": "identity"},
        # Certificates are checked for the name, not for the address.
        extensions={"sni_hostname": url.host, "asked": url},
    )
    response = client.send(request, stream=True)
    try:
        yield response
    finally:
        response.close()


def _content(response: httpx.Response) -> Iterator[bytes]:
    if response.status_code != 200:
        raise SourceFailed(f"the source answered with status {response.status_code}")
    # As it comes: a sender that trickles must not keep us from giving up.
    yield from response.iter_raw()


def judge_host(host: str, port: int, *, allow_private: bool) -> str:
    """Return an address of the host to connect to.

    Raises:
        SourceForbidden: one of its addresses is not public. Which one would be used is chance.
        SourceFailed: it has none.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise SourceFailed(f"the host {host!r} cannot be found") from error
    addresses = [str(entry[4][0]) for entry in found]
    if not allow_private:
        for address in addresses:
            if not _is_public(address):
                raise SourceForbidden(
                    f"the host {host!r} is on a private address; set allow_private_sources to "
                    "fetch from there"
                )
    return addresses[0]


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None:
            ip = inner
        elif ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip.is_site_local:  # deprecated, and routed all the same where it is in use
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
