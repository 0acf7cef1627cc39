"""What is wrong with a database or a server, and what to do."""
