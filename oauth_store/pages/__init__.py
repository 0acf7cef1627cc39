"""The web pages: consent, connected apps, sign-in and messages."""
