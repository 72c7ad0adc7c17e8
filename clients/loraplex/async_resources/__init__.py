"""The operations of `AsyncClient`, grouped as their paths are."""
