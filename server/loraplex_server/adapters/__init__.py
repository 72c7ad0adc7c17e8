"""The adapter catalogue: names, versions, validation, conversion, storage."""
