"""Limits on requests that anyone may send and that leave a row each: registrations and authorization requests."""

import ipaddress
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from starlette.requests import Request

from oauth_store.credentials import derive
from oauth_store.errors import ConfigurationError

if TYPE_CHECKING:  # importing it takes 20 milliseconds, and a process that serves no routes does not need it
    from limits import RateLimitItem

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_WITH_PORT = re.compile(r"\[([^]]+)\](?::\d+)?|([\d.]+):\d+")
POLLS = "1/4 seconds"
"""A second less than the interval that devices are given: the network delays some of their requests."""
PROXIES = 20
"""The most proxies that a request can have passed through; each is an address to parse."""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class OverLimitError(Exception):
    """A request is over a limit."""

    def __init__(self, retry_after: int) -> None:
        """`retry_after` is in seconds."""
        super().__init__("too many requests")
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimits:
    """How many registrations and authorization requests a process accepts, as in "60/minute". `None` means no limit.

    The defaults are generous, since the users of one client often share an address. A request over a limit gets 429
    with Retry-After. A registration that is never approved is kept for 30 days, so `registrations` bounds what a flood
    can leave behind. A client with a metadata document counts as a registration when it is stored, and a device that
    asks for a code as an authorization request.
    """

    registrations_per_address: str | None = "60/hour"
    registrations: str | None = "300/hour"
    authorizations_per_address: str | None = "60/minute"
    authorizations: str | None = "600/minute"


class Limiter:
    """Counts events in this process."""

    def __init__(self) -> None:
        from limits.storage import MemoryStorage
        from limits.strategies import FixedWindowRateLimiter

        self._strategy = FixedWindowRateLimiter(MemoryStorage())

    def retry_after(self, *counted: tuple["RateLimitItem | None", str]) -> int | None:
        """Count one event under each key. If one is over its limit, return the seconds to wait, else None.

        An event over a limit is not counted, and leaves no trace under the keys that follow. Name the total first,
        since there may be any number of addresses.
        """
        limited = [(limit, key) for limit, key in counted if limit is not None]
        for limit, key in limited:
            if not self._strategy.test(limit, key):
                return max(1, math.ceil(self._strategy.get_window_stats(limit, key).reset_time - time.time()))
        for limit, key in limited:
            self._strategy.hit(limit, key)
        return None

    def refund(self, *counted: tuple["RateLimitItem | None", str]) -> None:
        """Undo a count of `retry_after`."""
        for limit, key in counted:
            if limit is not None:
                self._strategy.hit(limit, key, cost=-1)

    def forget(self, limit: "RateLimitItem", key: str) -> None:
        """Reset the count of a key."""
        self._strategy.clear(limit, key)


class Polls:
    """The requests of devices for their tokens: each may come once in its interval (RFC 8628, section 3.5)."""

    def __init__(self) -> None:
        self._limiter: Limiter | None = None

    def is_early(self, device_code: str) -> bool:
        """Count a request of a device that waits for its owner, and return whether it came too early."""
        if self._limiter is None:
            self._limiter = Limiter()
            self._limit = _parsed("polls", POLLS)
        return self._limiter.retry_after((self._limit, derive(device_code, "polls"))) is not None


class FloodGuard:
    """Limits registrations and authorization requests, by address and in total."""

    def __init__(self, rate_limits: RateLimits, trusted_proxies: Sequence[str]) -> None:
        """Raises `ConfigurationError` for a limit or a network that cannot be parsed."""
        self._rate_limits = rate_limits
        if rate_limits != RateLimits():
            self._limits  # noqa: B018  (reports an invalid limit now)
        try:
            self._trusted: list[Network] = [_network(network) for network in trusted_proxies]
        except ValueError as error:
            raise ConfigurationError(f"trusted_proxies: {error}; expected addresses or networks") from error

    @cached_property
    def _limiter(self) -> Limiter:
        return Limiter()

    @cached_property
    def _limits(self) -> dict[str, tuple[str, "RateLimitItem | None", "RateLimitItem | None"]]:
        limits = self._rate_limits
        return {
            path: (name, _parsed(name, total), _parsed(f"{name}_per_address", per_address))
            for path, name, total, per_address in (
                ("/register", "registrations", limits.registrations, limits.registrations_per_address),
                ("/authorize", "authorizations", limits.authorizations, limits.authorizations_per_address),
                ("/device_authorization", "authorizations", limits.authorizations, limits.authorizations_per_address),
            )
        }

    def guards(self, path: str) -> bool:
        return path in self._limits

    def retry_after(self, path: str, request: Request) -> int | None:
        """Count a request. If it is over a limit, return the seconds to wait, else None."""
        return self._limiter.retry_after(*self._counted(path, request))

    def refund(self, path: str, request: Request) -> None:
        """Undo the count of a request that left nothing behind."""
        self._limiter.refund(*self._counted(path, request))

    def _counted(self, path: str, request: Request) -> tuple[tuple["RateLimitItem | None", str], ...]:
        name, total, per_address = self._limits[path]
        return (total, name), (per_address, f"{name} {self.address(request)}")

    def count_document(self, request: Request) -> None:
        """Count a client with a metadata document, whose row is kept as long as a registration.

        Raises `OverLimitError` if there are too many.
        """
        seconds = self.retry_after("/register", request)
        if seconds is not None:
            raise OverLimitError(seconds)

    def address(self, request: Request) -> str:
        """Return the sender of a request: the peer, or the address that trusted proxies report. IPv6 is cut to its /64.

        All lines of `X-Forwarded-For` are one list (RFC 9110, section 5.3): a proxy may add its own line below those
        that the sender made up.
        """
        sender = request.client.host if request.client else ""
        address = ip_address(sender)
        lines = ",".join(request.headers.getlist("x-forwarded-for"))
        forwarded = [part.strip() for part in lines.rsplit(",", PROXIES)[-PROXIES:] if part.strip()]
        while forwarded and self._is_trusted(address):
            sender = forwarded.pop()
            address = ip_address(sender)
        if address is None:
            return sender
        return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else str(address)

    def _is_trusted(self, address: Address | None) -> bool:
        return address is not None and any(address in network for network in self._trusted)


def ip_address(text: str) -> Address | None:
    """Parse the address of a peer, or one that a proxy wrote; return None if it is not an address.

    Drops its port, its brackets and the quotation marks of RFC 7239, section 6. Returns IPv4 inside IPv6, as a
    dual-stack listener (RFC 4291, section 2.5.5.2) or a NAT64 (RFC 6052, section 2.1) passes it on, as IPv4.
    """
    match = _WITH_PORT.fullmatch(text.strip('"'))
    try:
        address = ipaddress.ip_address(match[1] or match[2] if match else text)
    except ValueError:
        return None
    if address.version == 4:
        return address
    return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF) if address in _NAT64 else address.ipv4_mapped or address


def _network(text: str) -> Network:
    network = ipaddress.ip_network(text)
    if network.version == 6 and network.prefixlen >= 96 and network.network_address.ipv4_mapped:
        return ipaddress.ip_network((network.network_address.ipv4_mapped, network.prefixlen - 96))
    return network


def _parsed(name: str, limit: str | None) -> "RateLimitItem | None":
    from limits import parse

    if limit is None:
        return None
    try:
        return parse(limit)
    except ValueError as error:
        raise ConfigurationError(f'rate_limits: {name} is {limit!r}; expected a limit such as "60/minute"') from error
