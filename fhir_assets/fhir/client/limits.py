"""The limits of what one FHIR server may send."""

from dataclasses import dataclass, field

from fhir_assets.errors import NotFhir
from fhir_assets.fhir.labels import DEFAULT_LABELS, ServerLabels
from fhir_assets.fhir.transport.body import count_values
from fhir_assets.fhir.transport.limits import ANSWER_TIMEOUTS, DEFAULT_BYTES, AnswerLimits

_VALUES_OF_A_FILE = 10
_LEAST_VALUES = 10_000


@dataclass(frozen=True)
class ClientLimits:
    """The limits of the answers of a server, and of the pages and files of one request.

    ``answer_seconds`` is the time of one answer, by default ten times ``timeout``. A file of an export may take
    ``file_seconds``, as long as 64 KiB arrive within ``answer_seconds``. A line of a file that is longer than
    ``line_bytes`` is not kept. Sizes hold for what is received and for what it is decompressed to.
    """

    labels: ServerLabels = DEFAULT_LABELS
    timeout: float = 60
    answer_seconds: float | None = None
    answer_bytes: int = DEFAULT_BYTES
    max_pages: int = 500_000
    file_seconds: float = 6 * 3600
    file_bytes: int = 64 * 2**30
    max_files: int = 100_000
    line_bytes: int = 64 * 2**20
    answer: AnswerLimits = field(init=False)
    """The limits of an answer that is kept in memory."""
    file: AnswerLimits = field(init=False)
    """The limits of a file that is read line by line."""

    def __post_init__(self) -> None:
        seconds = self.answer_seconds or ANSWER_TIMEOUTS * self.timeout
        answer = AnswerLimits(
            seconds,
            self.answer_bytes,
            seconds_name=self.labels.answer_seconds,
            bytes_name=self.labels.answer_bytes,
        )
        file = AnswerLimits(
            self.file_seconds,
            self.file_bytes,
            stall_seconds=seconds,
            seconds_name=self.labels.file_seconds,
            stall_name=self.labels.answer_seconds,
            bytes_name=self.labels.file_bytes,
        )
        object.__setattr__(self, "answer", answer)
        object.__setattr__(self, "file", file)

    def check_pages(self, pages: int, what: str) -> None:
        """Raise NotFhir if ``what``, such as a search, has more pages than the limit."""
        if pages > self.max_pages:
            raise NotFhir(
                f"{what} has more than {self.max_pages:,} pages: its paging has no end, or it is larger than "
                f"{self.labels.max_pages} allows"
            )

    def check_manifest(self, body: bytes) -> None:
        """Raise NotFhir if a manifest has so much JSON that it would need too much memory to count its files."""
        if count_values(body) > max(_LEAST_VALUES, _VALUES_OF_A_FILE * self.max_files):
            self.check_files(self.max_files + 1)

    def check_files(self, files: int) -> None:
        """Raise NotFhir if an export has more files than the limit."""
        if files > self.max_files:
            raise NotFhir(
                f"the manifest of the export has more than {self.max_files:,} files: it has no end, or the export is "
                f"larger than {self.labels.max_files} allows"
            )
