"""Sign-in at GitHub, which has no OpenID Connect: OAuth, and an API that says who it was."""

import json
from collections.abc import Mapping

from oauth_store.openid import POST, READ_SECONDS, Attempt, NotSignedInError, Person, code_in, exchanged, fetched

GITHUB = "https://github.com"
"""The issuer of GitHub."""


class GitHub:
    """GitHub, or a server that speaks as it does. Users are known by their id, or by their login, which can change."""

    def __init__(
        self,
        client_id: str,
        client_secret: str,
        *,
        label: str | None = None,
        url: str = GITHUB,
        api_url: str = "https://api.github.com",
    ) -> None:
        self.label = label or "GitHub"
        self.identity = json.dumps([url, client_id])
        self._client_id, self._client_secret = client_id, client_secret
        self._url, self._api_url = url, api_url

    async def authorization_url(self, attempt: Attempt) -> str:
        """Return the address to which the browser goes. Without a scope, the token reads what is public."""
        return attempt.authorization_url(f"{self._url}/login/oauth/authorize", self._client_id, allow_signup="false")

    async def person(self, attempt: Attempt, response: Mapping[str, str]) -> Person:
        """Return who signed in. Raises `NotSignedInError` or `ProviderUnavailableError`."""
        from authlib.integrations.httpx_client import AsyncOAuth2Client

        code = code_in(response)
        async with AsyncOAuth2Client(
            self._client_id, self._client_secret, token_endpoint_auth_method=POST, timeout=READ_SECONDS
        ) as http:
            await exchanged(http, f"{self._url}/login/oauth/access_token", code, attempt)
            user = await fetched(http, f"{self._api_url}/user")
        if type(user.get("id")) is not int or not isinstance(user.get("login"), str):
            raise NotSignedInError("GitHub did not say who it was")
        return Person(str(user["id"]), login=user["login"])
