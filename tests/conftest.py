"""The one fixture world. See `tests/services.py` for the real PostgreSQL, Redis and S3."""
