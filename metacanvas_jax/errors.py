"""Errors a user can act on."""


class UserError(ValueError):
    """Bad input from outside (config, file, prompt): one line that names it and says what was expected.

    The command line prints the message without a traceback and exits with code 2.
    """
