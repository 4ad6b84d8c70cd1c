"""Ids of what a server holds for a client: nobody can guess them, and they tell several replicas apart."""

from __future__ import annotations

import secrets

ID_CHARS = 64  # at most
SEPARATOR = "."  # behind the replica's name


class Ids:
    """Makes the ids of one server.

    Attributes:
        replica: name of this server among several; "" = the only one.
    """

    def __init__(self, replica: str = "") -> None:
        self.replica = replica

    def new(self) -> str:
        """An id with 128 random bits."""
        token = secrets.token_urlsafe(16)
        return f"{self.replica}{SEPARATOR}{token}" if self.replica else token

    def elsewhere(self, held: str) -> bool:
        """Whether another replica has made the id `held`."""
        return replica_of(held) not in ("", self.replica)


def replica_of(held: str) -> str:
    """Name of the replica that has made an id; "" where it names none."""
    replica, separator, _ = held.partition(SEPARATOR)
    return replica if separator else ""
