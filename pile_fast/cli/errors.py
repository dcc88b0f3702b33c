"""The one error that a command ends with."""


class UserError(Exception):
    """Something the user can put right: ends the command with this one line and exit code 1."""
