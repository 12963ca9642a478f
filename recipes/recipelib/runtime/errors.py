"""The one exception that ends a recipe without a traceback."""


class UserError(Exception):
    """A mistake that the user can mend.

    Its text is the one line shown before exit code 2: the file, the key or row, what is wrong, and
    the cure.
    """
