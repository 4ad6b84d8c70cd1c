"""Errors that a user is meant to read: one line with what, where, expected, found, and the cure."""


class AsdError(Exception):
    """A problem with input or environment; the command line prints it as one line and exits 1."""


class ConfigError(AsdError):
    """A configuration, or a combination of settings, that cannot work."""


class CheckpointError(AsdError):
    """Weights that do not fit the network they are loaded into."""


class EngineError(AsdError):
    """An engine file or manifest that is absent, damaged, of another version or of another machine."""


class BackendError(AsdError):
    """An inference backend that is absent or cannot do what was asked."""


class PromptError(AsdError):
    """A prompt that the engine's text part cannot read."""


class OutputError(AsdError):
    """A result that cannot be written where it was asked for."""


class MediaError(AsdError):
    """A picture or a clip that cannot be read, or that no video can start from."""
