"""Text and tokens: prompts in, answers out. Pure Python beside the engine; no HTTP, no asyncio."""
