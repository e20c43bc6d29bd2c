"""Patches between the files of releases: what is made, how, and for whom. The wire is `device_sdk.protocol.patches`.

`layout` and `encoder` know nothing of Django; `maker` runs them in a process of its own; `services` keeps the rows.
"""
