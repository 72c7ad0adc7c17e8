"""The engine: scheduler, memory and model in one loop, in this process or in its own."""
