"""Everything that parses what others send, under mutated messages. `targets.py` lists it; a new parser is one row.

`test_fuzz.py` runs each target for a moment, `make fuzz SECONDS=600` for long. What made one fail is kept as a file in
`crashes/`, named by its target, and is tried again in every test run.
"""

import os

import django
from django.apps import apps

if not apps.ready:  # without pytest: some of the server's parsers want its settings
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
    django.setup()
