"""The flows of the server, one per file. Nothing here knows HTTP."""
