"""The share of a source's records that one part of a divided build reads."""

# Consecutive records that go to the same part: about a thousand, so that a part's documents form long runs, but few
# enough that a file of a million lines is divided evenly among a hundred parts.
BLOCK_RECORDS = 1024
# With at least this many files per part, each part opens only its own files; with fewer, the parts' sizes would differ
# too much.
_FILES_A_PART = 2


class Share:
    """The records of a source that belong to one part; readers ask it for each file and each record, in order.

    The owner of a record depends only on the file's index among the source's files and the record's index in its file,
    so no part has to read what belongs to others.

    Args:
        part: number of the part, from 0.
        parts: number of parts; with one, every record belongs to it.
        first: the part that owns the source's first records; differs between sources, so that small sources do not all
            go to the same part.
        whole_files: let each part own whole files if there are enough; not suitable if only the beginning of a source
            is needed, because its files might belong to few parts.
    """

    def __init__(self, part: int = 0, parts: int = 1, first: int = 0, *, whole_files: bool = True) -> None:
        assert 0 <= part < parts, (part, parts)
        self.parts, self._turn = parts, (part - first) % parts
        self._whole_files, self._by_file = whole_files, False
        self._file = self._record = 0

    @property
    def whole(self) -> bool:
        """Whether there is only one part."""
        return self.parts == 1

    @property
    def place(self) -> tuple[int, int]:
        """File and block of the last record asked for; sorting by place over all parts gives the source's order."""
        return self._file, self._record // BLOCK_RECORDS

    def begin(self, files: int) -> None:
        """Set the number of files of the source."""
        self._by_file = self._whole_files and files >= _FILES_A_PART * self.parts

    def open(self, file: int) -> bool:
        """Whether a file, counted from 0, may contain records of this part."""
        self._file, self._record = file, 0
        return self.whole or not self._by_file or file % self.parts == self._turn

    def mine(self, record: int) -> bool:
        """Whether a record of the opened file, counted from 0, belongs to this part."""
        self._record = record
        return self.whole or self._by_file or (self._file + record // BLOCK_RECORDS) % self.parts == self._turn
