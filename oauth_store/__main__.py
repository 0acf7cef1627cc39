"""`python -m oauth_store` is `oauth-store`."""

from oauth_store.cli.app import main

main()
