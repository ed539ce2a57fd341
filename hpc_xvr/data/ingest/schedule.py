"""What becomes of each file of an ingest run: id, split, duplicate; decided in the files' order."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hpc_xvr.data.cameras.source import Source
from hpc_xvr.data.corpus import Corpus, Video
from hpc_xvr.data.corpus.layout import SPLITS, Split
from hpc_xvr.data.corpus.writer import CorpusWriter
from hpc_xvr.data.ingest.treatment import Treatment
from hpc_xvr.data.ingest.workers import Job, Result
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger

SHARES: dict[Split, float] = dict(zip(SPLITS, (0.8, 0.1, 0.1), strict=True))
Status = Literal["added", "already there", "duplicate", "bad"]


@dataclass(frozen=True)
class Outcome:
    """What became of one recording: `id` is the video that holds its frames."""

    path: Path
    status: Status
    id: str = ""
    split: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Orders:
    """What every rank does next: its jobs, or nothing more, because all is done or had to end."""

    jobs: list[list[Job]]
    done: bool
    failed: bool


class Schedule:
    """Hands out files, and decides about what comes back in the order of the files.

    Clips are written without a split: it depends on the recordings before, and which of those are
    duplicates is known only when they have been read.
    """

    def __init__(
        self,
        writer: CorpusWriter,
        sources: Sequence[Source],
        treatment: Treatment,
        split: Split | Literal["auto"],
        skip_bad: bool,
    ) -> None:
        self._writer, self._sources, self._skip_bad = writer, sources, skip_bad
        self._split: Split | None = None if split == "auto" else split
        self._fingerprints = [treatment.fingerprint(source) for source in sources]
        self._present = _Present(Corpus(writer.path))
        self._outcomes: dict[int, Outcome] = {}
        for number in range(len(sources)):
            self._already_there(number)
        self._refuse_other_split(writer.path)
        self._waiting = deque(n for n in range(len(sources)) if n not in self._outcomes)
        self._handed_out: deque[int] = deque()  # and not decided yet
        self._results: dict[int, Result] = {}
        self._bad_file: InputError | None = None  # the first one
        self._failure: InputError | None = None  # no file's: it ends the run
        self._stopped = False
        self.new = len(self._waiting)
        """Recordings to be read."""
        self.nbytes = sum(sources[n].nbytes for n in self._waiting)
        """Bytes of their files."""

    def _refuse_other_split(self, corpus: Path) -> None:
        """A split that was asked for is not quietly another one."""
        other = {
            outcome.id: outcome.split
            for outcome in self._outcomes.values()
            if self._split and outcome.split != self._split
        }
        if other:
            some = ", ".join(f"{id} ({split})" for id, split in list(other.items())[:5])
            more = ", ..." if len(other) > 5 else ""
            raise InputError(
                f"corpus {corpus}: {some}{more}: there already, in another split; move with "
                f"`hpc-xvr edit {corpus} ID --split {self._split}`, or ingest without --split"
            )

    @property
    def decided(self) -> int:
        """How many of the new ones are decided about."""
        return len(self._outcomes) - (len(self._sources) - self.new)

    def orders(self, free: Sequence[int], window: int) -> Orders:
        """The next jobs for ranks that have room for so many; at most `window` are under way."""
        jobs: list[list[Job]] = [[] for _ in free]
        for rank in (rank for turn in range(max(free)) for rank, n in enumerate(free) if turn < n):
            job = self._next(window)
            if job is None:
                break
            jobs[rank].append(job)
        done = not self._handed_out and (self._stopped or not self._waiting)
        return Orders(jobs, done, self._failure is not None)

    def take(self, results: Iterable[Result]) -> None:
        """Decide about whatever can be decided now."""
        for result in results:
            if result.fatal:
                self._failure = self._failure or result.error
                continue
            self._results[result.number] = result
            self._stopped = self._stopped or bool(result.error and not self._skip_bad)
        try:
            while self._handed_out and self._handed_out[0] in self._results:
                number = self._handed_out.popleft()
                self._decide(number, self._results.pop(number))
        except InputError as error:  # the disk
            self._failure = self._failure or error

    def outcomes(self) -> list[Outcome]:
        """Of the recordings decided about, in order.

        Raises:
            InputError: the run failed, or a bad file stopped it, or none of the files was usable.
        """
        if self._failure:
            raise self._failure
        outcomes = [self._outcomes[number] for number in sorted(self._outcomes)]
        usable = sum(outcome.status != "bad" for outcome in outcomes)
        if not self._bad_file or (self._skip_bad and usable):
            return outcomes
        total = len(self._sources)
        if total == 1:
            raise self._bad_file
        if self._skip_bad:
            raise InputError(f"{self._bad_file}; none of the {total} recordings could be used")
        raise InputError(
            f"{self._bad_file}; {usable} of {total} recordings are in the corpus, --skip-bad goes "
            "on without the bad ones"
        )

    def _next(self, window: int) -> Job | None:
        enough = len(self._handed_out) >= window
        if self._stopped or self._failure or not self._waiting or enough:
            return None
        number = self._waiting.popleft()
        self._handed_out.append(number)
        source = self._sources[number]
        return Job(number, source, self._fingerprints[number], source.nbytes)

    def _decide(self, number: int, result: Result) -> None:
        for note in result.notes:
            logger.warning("%s", note)
        if result.error:
            self._refuse(number, result.error)
        elif self._already_there(number) or self._duplicate(number, result.entry):
            self._writer.discard(result.entry)
        else:
            self._add(number, result.entry)

    def _refuse(self, number: int, error: InputError) -> None:
        self._bad_file = self._bad_file or error
        if self._skip_bad:
            logger.warning("%s; skipped", error)
        path = self._sources[number].path
        self._outcomes[number] = Outcome(path, "bad", problem=str(error))

    def _already_there(self, number: int) -> bool:
        """Whether the corpus has this file, treated in this way."""
        known = self._present.by_fingerprint.get(self._fingerprints[number])
        if known is None:
            return False
        path = self._sources[number].path
        logger.info("%s: already there as %s", path, known.id)
        self._outcomes[number] = Outcome(path, "already there", known.id, known.split)
        return True

    def _duplicate(self, number: int, entry: dict[str, Any]) -> bool:
        """Whether the corpus has the same frames from another file."""
        shapes = entry["shape"], entry["lr_shape"], entry["dtype"]
        known = self._present.by_content.get(_content(entry["attributes"]["sha256"], *shapes))
        if known is None:
            return False
        path = self._sources[number].path
        logger.warning(
            "%s: holds the same frames as %s (from %s, split %s): skipped",
            *(path, known.id, known.source, known.split),
        )
        self._outcomes[number] = Outcome(path, "duplicate", known.id, known.split)
        return True

    def _add(self, number: int, entry: dict[str, Any]) -> None:
        source = self._sources[number]
        video = self._writer.commit(
            entry,
            id=self._present.unused_id(source),
            split=self._split or self._present.split_for(source),
        )
        self._present.add(video)
        self._outcomes[number] = Outcome(source.path, "added", video.id, video.split)
        logger.info(
            "%s: added as %s (%s, %s frames of %s x %s, %s bit)",
            *(source.path, video.id, video.split, *video.shape, video.info.bit_depth),
        )


class _Known(NamedTuple):
    """A video of the corpus."""

    id: str
    split: str
    source: str


class _Present:
    """What a corpus has, and what the next recording becomes there."""

    def __init__(self, corpus: Corpus) -> None:
        self.by_fingerprint: dict[str, _Known] = {}
        """Of the file and how it was treated."""
        self.by_content: dict[tuple[Any, ...], _Known] = {}
        """Of the frames, see `_content`."""
        self._ids: set[str] = set()
        self._split_of_file: dict[tuple[str, str], Split] = {}  # (folder, name)
        self._counts: Counter[str] = Counter()
        for video in corpus.videos:
            self.add(video)

    def add(self, video: Video) -> None:
        """Take note of a video of the corpus."""
        info = video.info
        known = _Known(video.id, video.split, info.source)
        content = _content(info.sha256, video.shape, video.lr_shape, video.dtype.name)
        self.by_content.setdefault(content, known)
        if "fingerprint" in info.metadata:
            self.by_fingerprint.setdefault(info.metadata["fingerprint"], known)
        file = info.metadata.get("source_folder", ""), info.source
        self._split_of_file.setdefault(file, info.split)
        self._counts[video.split] += 1
        self._ids.add(video.id)

    def split_for(self, source: Source) -> Split:
        """That of another recording of the same file, or of the one it seems to be a part of, else
        the one furthest below its share."""
        known = self._split_of_file.get(source.goes_on or (source.folder, source.name))
        if known is not None:
            return known
        total = sum(self._counts.values()) + 1
        return max(SHARES, key=lambda part: round(SHARES[part] * total - self._counts[part], 9))

    def unused_id(self, source: Source) -> str:
        """An id made of the file's name that no video has."""
        number, unique = 2, source.stem
        while unique in self._ids:
            unique, number = f"{source.stem}-{number}", number + 1
        return unique


def _content(
    sha256: str, shape: Sequence[int], lr_shape: Sequence[int] | None, dtype: str
) -> tuple[Any, ...]:
    """Equal for the same frames."""
    return sha256, tuple(shape), None if lr_shape is None else tuple(lr_shape), dtype
