"""Hydra 1.3 takes sweepers of the name space `hydra_plugins` alone (`Plugins._instantiate`)."""

from settings import search


class Search(search.Search):
    """`settings.search.Search` under the name that Hydra makes it by."""
