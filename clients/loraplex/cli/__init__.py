"""The `loraplex` command. Needs the extra `loraplex[cli]`: typer and rich."""
