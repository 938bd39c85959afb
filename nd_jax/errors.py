"""One exception for everything a user can put right."""


class UserError(Exception):
    """Bad input. The message is one line: what, where, what was expected, what to do.

    The command line prints it and exits with status 2; library callers catch it like any other exception.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))
