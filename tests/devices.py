"""A device without a browser, as it speaks to a server (RFC 8628)."""

from typing import Any

import httpx2

from oauth_store.flows.connected import DEVICE_CODE


class Device:
    """Registers itself, shows a code, and asks for its tokens."""

    def __init__(self, url: str, client_id: str = "") -> None:
        """`url` is the server's, as browsers reach it."""
        self.url = url
        self.client_id = client_id
        self.device_code = ""
        self.user_code = ""

    async def register(self, **metadata: Any) -> httpx2.Response:
        """Register for the device grant alone, as mcp-remote does."""
        values = {
            "client_name": "Television",
            "grant_types": [DEVICE_CODE, "refresh_token"],
            "token_endpoint_auth_method": "none",
            "redirect_uris": [],
        }
        async with httpx2.AsyncClient(timeout=60) as http:
            answer = await http.post(f"{self.url}/register", json=values | metadata)
        if answer.status_code == 201:
            self.client_id = answer.json()["client_id"]
        return answer

    async def ask(self, **fields: str) -> httpx2.Response:
        """Ask for a code to show."""
        answer = await self.post("/device_authorization", **fields)
        if answer.status_code == 200:
            self.device_code, self.user_code = answer.json()["device_code"], answer.json()["user_code"]
        return answer

    async def poll(self, **fields: str) -> httpx2.Response:
        """Ask for tokens."""
        return await self.post("/token", **{"grant_type": DEVICE_CODE, "device_code": self.device_code, **fields})

    async def post(self, path: str, **fields: str) -> httpx2.Response:
        """Send a form, as this client."""
        async with httpx2.AsyncClient(timeout=60) as http:
            return await http.post(f"{self.url}{path}", data={"client_id": self.client_id, **fields})


async def asking(url: str, **fields: str) -> Device:
    """A device that has registered and shows a code."""
    device = Device(url)
    registered = await device.register()
    assert registered.status_code == 201, registered.text
    answer = await device.ask(**fields)
    assert answer.status_code == 200, answer.text
    return device


def error_of(answer: httpx2.Response) -> str:
    """The error code of an answer, or nothing."""
    return "" if answer.status_code == 200 else str(answer.json()["error"])
