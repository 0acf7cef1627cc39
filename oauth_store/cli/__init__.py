"""The command line, `oauth-store`."""
