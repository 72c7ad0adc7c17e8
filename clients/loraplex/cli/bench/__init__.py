"""`loraplex bench`: a load generator for a server, ours or another that speaks OpenAI's API."""
