"""`loraplex top`: what the server does, as it does it."""
