"""Which proxy a request goes through: none to this machine itself, to others what the environment names."""

import urllib.request
from collections.abc import Mapping
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def local(url: str) -> bool:
    return urlsplit(url).hostname in LOOPBACK


def direct(environ: Mapping[str, str]) -> dict[str, str]:
    """NO_PROXY, in both spellings, with the names of this machine: for our own process and all it starts."""
    listed = ",".join(environ.get(name, "") for name in ("no_proxy", "NO_PROXY")).split(",")
    given = [name.strip() for name in listed if name.strip()]
    names = "*" if "*" in given else ",".join(dict.fromkeys([*given, *LOOPBACK]))
    return {"no_proxy": names, "NO_PROXY": names}


def opener(url: str, *handlers: urllib.request.BaseHandler) -> urllib.request.OpenerDirector:
    """What opens an address. ALL_PROXY counts, too, if it names an HTTP proxy: urllib alone ignores it."""
    proxies = {} if local(url) else urllib.request.getproxies()
    every = proxies.pop("all", "")
    if every and not socks(every):
        proxies = {"http": every, "https": every} | proxies
    return urllib.request.build_opener(urllib.request.ProxyHandler(proxies), *handlers)


def socks(proxy: str) -> bool:
    return proxy.casefold().startswith("socks")
