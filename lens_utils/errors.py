"""What a user can mend: said in one line, without a traceback, with a non-zero exit."""


class BadInput(ValueError):
    """The command, a file or a setting is wrong (exit code 2)."""


class Failure(RuntimeError):
    """The command was right and still could not be carried out (exit code 1)."""


class Unfinished(Exception):
    """This shard's parts are done, other shards' are not. Not an error (exit code 0)."""
