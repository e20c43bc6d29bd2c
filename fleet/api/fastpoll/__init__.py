"""Polls answered before Django: a 304, or an unchanged 200, from memory. Everything else goes on to Django.

`wsgi` wraps the application, `table` knows the fleet, `feed` keeps it true. `FLEET_FAST_POLL=0` leaves it all out, and
changes no answer.
"""
