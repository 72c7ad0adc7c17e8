# Written by clients/generate_sync.py from async_resources/__init__.py: change that, and run it.
"""The operations of `Client`, grouped as their paths are."""
