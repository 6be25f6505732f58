"""The table of bad inputs: name to the function that meets one, and the message expected of it."""

CASES = {}


def case(message):
    """Registers ``function(folder)``, which must raise a UserError of one line that matches."""

    def register(function):
        CASES[function.__name__] = (function, message)
        return function

    return register


def table(cases):
    """The same for small functions: name to (function, message)."""
    assert not CASES.keys() & cases.keys()
    CASES.update(cases)
