"""What the server does: one flow, one file. Nothing here knows HTTP."""
