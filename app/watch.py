"""How the federation stands, in a terminal: ``vlafleet status`` and ``vlafleet watch``."""


def status() -> None:
    """Show how the federation and its newest run stand."""
    raise NotImplementedError


def watch() -> None:
    """Show it live, until Ctrl-C."""
    raise NotImplementedError
