"""What each step asks of the database, so that nobody adds a statement, a transaction or a hop by accident."""

import pytest

from tests.counting import Cost, count_steps

#                                                    SQLite                 servers
COSTS = {
    "register_client": (Cost(1, 1, hops=1), Cost(1, 1)),
    "get_client": (Cost(1, 0, hops=1), Cost(1, 0)),
    "authorize": (Cost(1, 1, hops=1), Cost(1, 1)),
    "approve": (Cost(3, 1, hops=1), Cost(3, 1)),
    "load_authorization_code": (Cost(1, 0, hops=1), Cost(1, 0)),
    "exchange_authorization_code": (Cost(3, 1, hops=1), Cost(3, 1)),
    "verify, first use (its stamp is off the path)": (Cost(1, 0, hops=1), Cost(1, 0)),
    "verify, not seen": (Cost(1, 0, hops=1), Cost(1, 0)),
    "verify, seen before": (Cost(0, 0, hops=0), Cost(1, 0)),
    "verify, unknown token": (Cost(1, 0, hops=1), Cost(1, 0)),
    "load_refresh_token": (Cost(1, 0, hops=1), Cost(1, 0)),
    "exchange_refresh_token": (Cost(4, 1, hops=1), Cost(4, 1)),
    "exchange_refresh_token, replayed": (Cost(2, 0, hops=1), Cost(2, 1)),
    "revoke_token": (Cost(4, 1, hops=1), Cost(6, 1)),
}


@pytest.mark.not_on_mariadb("its driver does not tell what it sends; it is what PostgreSQL gets, and 2 SELECTs")
async def test_a_step_costs_no_more(database_url: str) -> None:
    """Each step sends exactly these statements, in so many transactions, and waits so often."""
    server = "://" in database_url
    assert await count_steps(database_url) == {step: costs[server] for step, costs in COSTS.items()}
