"""`loraplex doctor`: what could keep a server from starting, or a client from using one."""
