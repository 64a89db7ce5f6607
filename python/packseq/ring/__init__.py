"""What runs over several ranks: see packseq.ring.communicator."""

from .communicator import Communicator, communicator

__all__ = ["Communicator", "communicator"]
