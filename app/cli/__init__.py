"""The `dpo` command."""
