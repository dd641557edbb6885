"""Stand-ins that several tests share."""


class TextStore:
    """What a token store of plain text says of itself; subclasses hold the blocks."""

    folder, format, document_mask, vocabulary_size, bytes_per_token = "store", "text", False, 48, 4.0

    @property
    def longest(self) -> int:
        return self.sequence_length

    def learnt(self, indices):
        return None
