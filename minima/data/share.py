"""Which records of a source are read by one of several builds that divide it."""

# Neighbouring records that go to one part: some thousand, so that a part's documents lie in long runs, and few enough
# that a file of a million lines is divided evenly among a hundred parts.
BLOCK_RECORDS = 1024
# From so many files a part on, a part opens only its own files; with fewer, the parts would differ much in size.
_FILES_A_PART = 2


class Share:
    """The records of one part of a source; readers ask it for each file and each record, in order.

    A record's owner follows from the file's place among the source's files and the record's place in its file, so no
    part has to read what belongs to others to know its own.

    Args:
        part: number of the part, from 0.
        parts: how many there are; of one, everything is its own.
        first: whose the source's first records are; another part's for each source, so that small sources do not all
            fall to the same one.
        whole_files: let a part own whole files where there are enough; not where only a source's beginning is wanted,
            which may be the files of few parts.
    """

    def __init__(self, part: int = 0, parts: int = 1, first: int = 0, *, whole_files: bool = True) -> None:
        assert 0 <= part < parts, (part, parts)
        self.parts, self._turn = parts, (part - first) % parts
        self._whole_files, self._by_file = whole_files, False
        self._file = self._record = 0

    @property
    def whole(self) -> bool:
        """Whether nothing is left to other parts."""
        return self.parts == 1

    @property
    def place(self) -> tuple[int, int]:
        """File and block of the record that was asked for last; over all parts, places in order are the source's."""
        return self._file, self._record // BLOCK_RECORDS

    def begin(self, files: int) -> None:
        """Say how many files the source has."""
        self._by_file = self._whole_files and files >= _FILES_A_PART * self.parts

    def open(self, file: int) -> bool:
        """Whether a file, counted from 0, can hold records of this part."""
        self._file, self._record = file, 0
        return self.whole or not self._by_file or file % self.parts == self._turn

    def mine(self, record: int) -> bool:
        """Whether a record of the opened file, counted from 0, belongs to this part."""
        self._record = record
        return self.whole or self._by_file or (self._file + record // BLOCK_RECORDS) % self.parts == self._turn
