"""Approvals that wait for the test's answer, or give their own at once."""

from collections.abc import Iterator

from oauth_store import AuthorizationRequest, SQLAlchemyOAuthProvider


class Asks:
    """An approval whose page the test answers, if anyone does."""

    def __init__(self, page: str = "http://127.0.0.1/asked") -> None:
        self.handle = ""
        self._page = page

    async def authorize(self, _provider: SQLAlchemyOAuthProvider, request: AuthorizationRequest) -> str:
        """Note whose answer is waited for, and return the address of the page."""
        self.handle = request.handle
        return self._page


class Owner:
    """Approves every request, each for the next subject."""

    def __init__(self, subjects: Iterator[str]) -> None:
        self._subjects = subjects

    async def authorize(self, provider: SQLAlchemyOAuthProvider, request: AuthorizationRequest) -> str:
        """Approve."""
        return await provider.approve(request.handle, subject=next(self._subjects))
