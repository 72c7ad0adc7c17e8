"""loraplex as a Ray Serve application: `serve run loraplex_server.ray_serve.app:build_app`.

Two deployments. `front` is what Serve's proxies call: it reads which adapter a request is for, and
hands the request to a `replica` through Serve's own router, which prefers replicas that have
answered with this adapter before. Each replica is a whole server without a socket. See decision 30.
"""
