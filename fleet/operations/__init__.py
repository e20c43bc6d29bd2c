"""How the server is run: serve, checks, logging, metrics, the broker of files. It has no models."""
