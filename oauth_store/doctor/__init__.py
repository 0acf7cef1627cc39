"""`oauth-store doctor`: problems of a database or a server, and how to fix them."""
