"""All adapters at once. Imports no torch."""

from .declared import Composition


class Add(Composition):
    """The changes of all adapters add up, each at its strength."""

    name = "add"
    words = "all at once"
    fewest = 0
