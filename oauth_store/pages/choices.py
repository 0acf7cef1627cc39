"""The scopes that the owner chooses from on a page, each with the tools that it opens."""

import asyncio
import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any
from weakref import WeakKeyDictionary

from fastmcp import FastMCP
from fastmcp.server.auth import AccessToken
from fastmcp.tools import Tool
from mcp.server.auth.middleware.auth_context import auth_context_var
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from starlette.requests import Request

from oauth_store.display import short_line
from oauth_store.flows.clients import OFFLINE_ACCESS
from oauth_store.flows.issuer import ServerScopes
from oauth_store.pages.wording import scope_in_words

logger = logging.getLogger("oauth_store")

TOOLS_SECONDS = 2
"""How long a page waits for the names of the tools: some may be on another server."""
TOOLS_KEPT_SECONDS = 30
"""How long the pages use one list of the tools: anyone can open a consent page."""
TOOLS_SHOWN = 6
"""Tools that a page names for one scope."""
KINDS = DESTROY, OTHERS, ONLY_READ = "Tools that can delete or overwrite", "Tools", "Tools that only read"
"""What a page calls the tools, by their annotations: the kind that it must not leave out is the first."""

Tools = Mapping[str, Sequence[tuple[str, str]]]
"""The tools that each scope opens: what kind they are of, and their names."""


@dataclass(frozen=True, slots=True)
class ScopeChoice:
    """A checkbox."""

    scope: str
    words: str
    tools: Sequence[tuple[str, Sequence[str]]]
    """The tools that no token opens without this scope, under what they do: the most dangerous first."""
    more_tools: int
    ticked: bool
    fixed: bool
    """Whether the server requires the scope, so that the box cannot be unticked."""


@dataclass(frozen=True, slots=True)
class Choices:
    """The checkboxes of one client: those of the scopes that it asked for or has, and the others."""

    first: Sequence[ScopeChoice]
    offered: Sequence[ScopeChoice]

    def __iter__(self) -> Iterator[ScopeChoice]:
        yield from self.first
        yield from self.offered

    def __bool__(self) -> bool:
        """Tell whether there is anything to choose."""
        return not all(choice.fixed for choice in self)

    def chosen(self, posted: Collection[str]) -> list[str] | None:
        """Return the scopes that a form has ticked, and the required ones; None if it names one without a box."""
        if not {choice.scope for choice in self}.issuperset(posted):
            return None
        return [choice.scope for choice in self if choice.fixed or choice.scope in posted]


def choices_of(
    scopes: Sequence[str],
    offered: Collection[str],
    server: ServerScopes,
    descriptions: Mapping[str, str],
    tools: Tools,
    ticked: Collection[str] | None = None,
) -> Choices:
    """Return the boxes of a client that asked for or has `scopes`, of all that it can have.

    None on a server that does not list its scopes. `ticked` are the boxes that a form has ticked already.
    """
    if server.listed is None:
        return Choices((), ())

    def choice(scope: str) -> ScopeChoice:
        opened, required = tools.get(scope, ()), scope in server.required
        return ScopeChoice(
            scope=scope,
            words=scope_in_words(scope, descriptions),
            tools=[(kind, [name for _, name in named]) for kind, named in groupby(opened[:TOOLS_SHOWN], itemgetter(0))],
            more_tools=len(opened[TOOLS_SHOWN:]),
            ticked=required or scope in (scopes if ticked is None else ticked),
            fixed=required,
        )

    first = dict.fromkeys(scope for scope in (*scopes, *server.required) if scope != OFFLINE_ACCESS)
    rest = dict.fromkeys(scope for scope in offered if scope != OFFLINE_ACCESS and scope not in first)
    return Choices([choice(scope) for scope in first], [choice(scope) for scope in rest])


@dataclass(frozen=True, slots=True)
class _Listing:
    """The tools of a server, as one page has them listed and the next pages may use them."""

    scopes: Collection[str]
    until: float
    tools: asyncio.Task[Tools]

    def serves(self, scopes: Collection[str]) -> bool:
        """Tell whether a page may use this one. A server may be used in several event loops, one after the other."""
        usable = not self.tools.cancelled() and self.tools.get_loop() is asyncio.get_running_loop()
        return usable and self.scopes == scopes and (time.monotonic() < self.until or not self.tools.done())


_listings: WeakKeyDictionary[FastMCP[Any], _Listing] = WeakKeyDictionary()


async def tools_by_scope(request: Request, scopes: ServerScopes) -> Tools:
    """Return the tools of the server that need each of its scopes, as they were within the last `TOOLS_KEPT_SECONDS`.

    Nothing, where the server cannot list its tools in time: the page works without. Anyone can load a page, and a list
    takes up to a fifth of a second of processor time: pages share it. The server is asked outside of the request,
    since a server that is mounted through a proxy would get the headers of the owner's browser.
    """
    server: FastMCP[Any] | None = getattr(request.app.state, "fastmcp_server", None)
    wanted = frozenset() if scopes.listed is None else frozenset([*(scopes.valid or ()), *scopes.required])
    if server is None or not wanted:
        return {}
    listing = _listings.get(server)
    if listing is None or not listing.serves(wanted):
        task = asyncio.get_running_loop().create_task(_tools_in_time(server, wanted), context=Context())
        listing = _listings[server] = _Listing(wanted, time.monotonic() + TOOLS_KEPT_SECONDS, task)
    return await asyncio.shield(listing.tools)


async def _tools_in_time(server: FastMCP[Any], scopes: Collection[str]) -> Tools:
    try:
        async with asyncio.timeout(TOOLS_SECONDS):
            return await _tools_by_scope(server, scopes)
    except Exception:
        logger.warning("the pages cannot show which tools a scope opens", exc_info=True)
        return {}


async def _tools_by_scope(server: FastMCP[Any], scopes: Collection[str]) -> Tools:
    everything, nothing = await _listed(server, scopes), await _listed(server, ())
    needs = {name: _required_scopes(tool) for name, tool in everything.items() if name not in nothing}
    # a server that is mounted checks its tools itself: ask it what one scope makes of its list
    hidden = {name for name, required in needs.items() if not required}
    for scope in scopes if hidden else ():
        await asyncio.sleep(0)  # other requests first
        without = await _listed(server, [other for other in scopes if other != scope])
        for name in hidden - without.keys():
            needs[name].add(scope)
    opened: dict[str, list[tuple[str, str]]] = {}
    for name in needs:
        for scope in needs[name]:
            opened.setdefault(scope, []).append(_described(everything[name]))
    return {scope: sorted(tools, key=lambda tool: (KINDS.index(tool[0]), tool[1])) for scope, tools in opened.items()}


async def _listed(server: FastMCP[Any], scopes: Collection[str]) -> dict[str, Tool]:
    """Return the tools that a token with these scopes sees. Such a token exists for the length of the call alone."""
    token = AccessToken(token="", client_id="", scopes=list(scopes))
    context = auth_context_var.set(AuthenticatedUser(token))
    try:
        return {tool.name: tool for tool in await server.list_tools(run_middleware=False)}
    finally:
        auth_context_var.reset(context)


def _required_scopes(tool: Tool) -> set[str]:
    checks: list[Any] = tool.auth if isinstance(tool.auth, list) else [tool.auth]
    return {
        scope
        for check in checks
        if getattr(check, "tag", None) is None or check.tag in tool.tags
        for scope in getattr(check, "required_scopes", ())
    }


def _described(tool: Tool) -> tuple[str, str]:
    annotations = {} if tool.annotations is None else tool.annotations.model_dump(by_alias=True)
    name = short_line(tool.title or annotations.get("title") or tool.name)
    if annotations.get("readOnlyHint"):
        return ONLY_READ, name
    return DESTROY if annotations.get("destructiveHint") else OTHERS, name
