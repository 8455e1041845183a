"""How models are joined, one level a file; see parts.py for what each offers."""
