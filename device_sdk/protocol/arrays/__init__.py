"""Messages that carry arrays. A room of its own, because it needs numpy and the rest of the protocol does not."""
