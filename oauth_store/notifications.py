"""Word to the owner of what they may want to act on: a new app, a refused sign-in, a reused token, a new token."""

import asyncio
import inspect
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

import httpx2
from mcp.shared.auth import OAuthClientInformationFull

from oauth_store.display import app_name, one_line
from oauth_store.errors import ConfigurationError

logger = logging.getLogger("oauth_store")

WAITING = 20
"""How many notifications can wait to be sent. More are dropped."""
AT_ONCE = 2
"""How many are sent at the same time."""
SEND_SECONDS = 10.0
"""How long one may take."""
QUIET_SECONDS = 60
"""How long a second refused sign-in is not reported: an attacker could cause any number."""
CLOSE_SECONDS = 2.0
"""How long the server waits at its end for the notifications that are being sent."""

_TITLES = {
    "approval_granted": "An app was allowed",
    "approval_denied": "An app was denied",
    "code_replayed": "A code was used twice",
    "reuse_detected": "A refresh token was used again",
    "sign_in_failed": "A sign-in failed",
    "token_created": "A personal token was created",
    "passkey_added": "A passkey was added",
}
"""The events that are sent. docs/events.md has the meaning of each."""


@dataclass(frozen=True, slots=True)
class Notification:
    """What happened at a server. The names are chosen by clients: show them as text."""

    event: str
    """As in the log: `approval_granted`, `approval_denied`, `code_replayed`, `reuse_detected`, `sign_in_failed`,
    `token_created` or `passkey_added`."""
    title: str
    message: str
    server: str
    at: int
    """In epoch seconds."""
    client_id: str | None = None
    client_name: str | None = None
    subject: str | None = None
    address: str | None = None
    grant_id: str | None = None


Notify = str | Callable[[Notification], Awaitable[None] | None]
"""An http(s) URL to which each notification is posted as JSON, or a function that sends it in its own way."""


class Notifier:
    """Sends notifications, off the path of the request that caused them: a failure costs nothing but its message."""

    def __init__(
        self,
        notify: Notify,
        server: str,
        get_client: Callable[[str], Awaitable[OAuthClientInformationFull | None]],
    ) -> None:
        """`get_client` looks up a client, for its name. Raises `ConfigurationError` for what cannot be used."""
        if isinstance(notify, str):
            url = urlsplit(notify)
            if url.scheme not in ("http", "https") or not url.hostname:
                raise ConfigurationError("notify is not an http:// or https:// URL; pass one, or a function")
        elif not callable(notify):
            raise ConfigurationError(f"notify is of type {type(notify).__name__}; pass a URL or a function")
        self._notify = notify
        self._server = server
        self._get_client = get_client
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="oauth_store-notify")
        self._last_failure = -math.inf

    def __call__(self, event: str, fields: Mapping[str, str | int]) -> None:
        """Send a notification of an event, if the owner may want to act on it."""
        if event not in _TITLES or len(self._tasks) >= WAITING:
            return
        if event == "sign_in_failed":
            if time.monotonic() - self._last_failure < QUIET_SECONDS:
                return
            self._last_failure = time.monotonic()
        task = asyncio.create_task(self._send(event, dict(fields), int(time.time())))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self, event: str, fields: dict[str, str | int], at: int) -> None:
        notify, loop = self._notify, asyncio.get_running_loop()
        try:
            async with asyncio.timeout(SEND_SECONDS):
                notification = await self._notification(event, fields, at)
                if isinstance(notify, str):  # in a thread, because a client reads the system's certificates
                    await loop.run_in_executor(self._threads, _post, notify, notification)
                elif inspect.iscoroutinefunction(notify):
                    await notify(notification)
                else:
                    await loop.run_in_executor(self._threads, notify, notification)
        except Exception as error:
            logger.warning("a notification could not be sent (%s): %s", event, _reason(error))

    async def _notification(self, event: str, fields: dict[str, str | int], at: int) -> Notification:
        named = {name: str(fields[name]) for name in ("client_id", "subject", "address", "grant_id") if name in fields}
        client = await self._get_client(named["client_id"]) if "client_id" in named else None
        client_name = None if client is None else client.client_name
        text = _text(event, fields, self._server)
        if "client_id" in named:  # last, so that a name cannot continue in our words
            text += f" Name: {app_name(client_name)}"
        return Notification(event, _TITLES[event], text, self._server, at, client_name=client_name, **named)

    async def close(self) -> None:
        """Wait a moment for what is being sent, and drop the rest."""
        tasks = [task for task in self._tasks if task.get_loop() is asyncio.get_running_loop()]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
            for task in late:
                task.cancel()


def _text(event: str, fields: Mapping[str, str | int], server: str) -> str:
    by = f" by {one_line(str(fields['subject']))}" if "subject" in fields else ""
    texts = {
        "approval_granted": f"It was allowed to use {server}{by}.",
        "approval_denied": f"It asked to use {server}.",
        "code_replayed": f"Its access to {server} was revoked: a code can be used only once.",
        "reuse_detected": f"Its access to {server} was revoked: someone may have stolen the token. Connect it again.",
        "sign_in_failed": f"At {server}, from {fields.get('address')}: {fields.get('reason')}.",
        "passkey_added": f"{one_line(str(fields.get('subject')))} can sign in to {server} with it.",
        "token_created": f"It can use {server}. It was created by {one_line(str(fields.get('by')))}.",
    }
    return texts[event]


def _post(url: str, notification: Notification) -> None:
    fields = asdict(notification)
    body = fields | {"text": f"{notification.title}. {notification.message}"}  # what Slack and its kind read
    httpx2.post(url, json=body, timeout=SEND_SECONDS).raise_for_status()


def _reason(error: Exception) -> str:
    """Return why a notification was not sent. Never the error's own text: a webhook's URL is a secret."""
    return f"HTTP {error.response.status_code}" if isinstance(error, httpx2.HTTPStatusError) else type(error).__name__
