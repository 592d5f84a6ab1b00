"""The errors a user can meet. Each message says what was found, where, what was expected, what to do."""


class OdtrtError(Exception):
    """Base of every error that odtrt raises on purpose; the CLI prints it on one line."""


class InputError(OdtrtError):
    """A file or an array handed in is missing, damaged or not of the expected form."""


class UnsupportedError(OdtrtError):
    """The input is valid, but asks for something that odtrt does not do. Names the setting."""


class MissingDependencyError(OdtrtError):
    """An optional package is not installed. Says which command installs it."""


class CheckError(OdtrtError):
    """A gate failed: two things that must agree do not."""


class BuildError(OdtrtError):
    """TensorRT refused or failed to build an engine."""


def one_line(message: object) -> str:
    """Another library's message or exception without line breaks, to quote in one of ours."""
    return " ".join(str(message).split()) or type(message).__name__
