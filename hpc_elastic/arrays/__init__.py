"""Arrays on the host; other devices get a module of their own."""
