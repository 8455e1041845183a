"""What papers claim, beside what recipes show of it on the embedded zoo."""
