"""The TUF repository: offline roles as CI and people signed them, and one online-signed view per device."""
