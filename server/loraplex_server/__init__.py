"""The serving process: HTTP, engine loop, base model, adapter catalogue."""
