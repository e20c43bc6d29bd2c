"""Who changed what, when, from where and why: append-only rows in a hash chain. Knows no other room."""
