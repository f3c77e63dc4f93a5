"""What a back end of regions raises for what it cannot hold."""


class Unknown(Exception):
    """A region cannot hold this; the message says why, and the ledger shows it."""
