"""Models, releases, variants and artifacts; object storage and validation."""
