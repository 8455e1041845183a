"""Reports: what is known of a zoo, drawn for people."""
