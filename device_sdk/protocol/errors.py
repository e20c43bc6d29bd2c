"""The one error that parsing can raise. Each side wraps it in its own family at its border."""


class ProtocolError(ValueError):
    """What arrived is not what the protocol allows. `code` is stable; `message` says what was expected and came."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
