"""The one error that means "the input is wrong", as opposed to a fault of the program."""


class InputError(ValueError):
    """A mistake in what the user gave: its message says what was found and what was expected.

    The command line prints the message alone and exits with code 2.
    """
