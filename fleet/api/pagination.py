"""Lists go out in pages."""

from rest_framework.pagination import LimitOffsetPagination


class BoundedPages(LimitOffsetPagination):
    """A page is held in memory whole, and a limit beyond a database's integers is an error there: so, a ceiling."""

    max_limit = 1000
