"""What `tests.forks` imports before it forks: all that `oauth-store` imports late, and a server."""
