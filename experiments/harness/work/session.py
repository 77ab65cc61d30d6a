"""What ends a run before its end."""


class Interrupted(Exception):
    """The run was asked to stop; its checkpoint is written."""


class Diverged(Exception):
    """The loss is no longer finite."""
