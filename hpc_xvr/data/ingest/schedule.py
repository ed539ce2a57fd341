"""What becomes of each file of an ingest run: id, split, duplicate; decided in the files' order."""

from __future__ import annotations

from collections import ChainMap, Counter, deque
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpc_xvr.data.cameras.source import Source
from hpc_xvr.data.corpus import Corpus
from hpc_xvr.data.corpus.layout import SPLITS
from hpc_xvr.data.corpus.writer import CorpusWriter
from hpc_xvr.data.ingest.treatment import Treatment
from hpc_xvr.data.ingest.workers import Job, Result
from hpc_xvr.errors import InputError
from hpc_xvr.log import logger

SHARES = dict(zip(SPLITS, (0.8, 0.1, 0.1), strict=True))
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
    """What every rank is told: its jobs, and whether that is all."""

    jobs: list[list[Job]]
    over: bool
    fatal: str


class Plan:
    """Hands out files, and decides about what comes back in the order of the files.

    A recording's split depends on those before it, and it has to be written to know whether those
    are duplicates. So each is written with the split it should get; where that proves wrong, it is
    written again.
    """

    def __init__(
        self,
        writer: CorpusWriter,
        sources: Sequence[Source],
        treatment: Treatment,
        split: str,
        skip_bad: bool,
    ) -> None:
        self.problem = ""
        """What is wrong with the first file that cannot be used."""
        self._writer, self._sources, self._skip_bad = writer, sources, skip_bad
        self._split = None if split == "auto" else split
        self._prints = [treatment.fingerprint(source) for source in sources]
        self._book = _Book(Corpus(writer.path))
        self._found: dict[int, Outcome] = {}
        for number in range(len(sources)):
            self._already(number)
        self._waiting = deque(n for n in range(len(sources)) if n not in self._found)
        self._out: deque[int] = deque()  # handed out, not decided yet
        self._again: deque[Job] = deque()
        self._results: dict[int, Result] = {}
        self._ahead = self._book.ahead()
        self._stopped, self._fatal = False, ""
        self.total = len(sources)
        self.new = len(self._waiting)
        """Recordings to be read."""
        self.nbytes = sum(sources[n].nbytes for n in self._waiting)
        """Bytes of their files."""

    @property
    def outcomes(self) -> list[Outcome]:
        """Of the recordings decided about, in order."""
        return [self._found[number] for number in sorted(self._found)]

    @property
    def decided(self) -> int:
        """How many of the new ones are decided about."""
        return len(self._found) - (self.total - self.new)

    def orders(self, free: Sequence[int], window: int) -> Orders:
        """The next jobs for ranks that have room for so many; at most `window` are under way."""
        jobs: list[list[Job]] = [[] for _ in free]
        for rank in (rank for turn in range(max(free)) for rank, n in enumerate(free) if turn < n):
            job = self._next(window)
            if job is None:
                break
            jobs[rank].append(job)
        over = not self._out and (self._stopped or not self._waiting)
        return Orders(jobs, over, self._fatal)

    def take(self, results: Iterable[Result]) -> None:
        """Decide about whatever can be decided now."""
        for result in results:
            if result.fatal:
                self._fatal = self._fatal or result.problem
                continue
            self._results[result.number] = result
            self._stopped = self._stopped or bool(result.problem and not self._skip_bad)
        try:
            while self._out and self._out[0] in self._results:
                if not self._decide(self._out[0], self._results.pop(self._out[0])):
                    break
        except InputError as error:
            self._fatal = self._fatal or str(error)

    def _next(self, window: int) -> Job | None:
        if self._again:
            return self._again.popleft()
        if self._stopped or self._fatal or not self._waiting or len(self._out) >= window:
            return None
        number = self._waiting.popleft()
        self._out.append(number)
        return self._job(number, self._look_ahead(number))

    def _job(self, number: int, split: str) -> Job:
        source = self._sources[number]
        return Job(number, source, split, self._prints[number], source.nbytes)

    def _look_ahead(self, number: int) -> str:
        """The split a recording gets if all before it are added."""
        source = self._sources[number]
        split = self._split or self._ahead.split(source)
        self._ahead.count((source.folder, source.name), split)
        return split

    def _decide(self, number: int, result: Result) -> bool:
        """False: it is to be written again."""
        source, entry = self._sources[number], result.entry
        for note in result.notes:
            logger.warning("%s", note)
        if result.problem:
            self.problem = self.problem or result.problem
            if self._skip_bad:
                logger.warning("%s; skipped", result.problem)
            self._found[number] = Outcome(source.path, "bad", problem=result.problem)
        elif self._already(number):
            self._writer.discard(entry)
        elif (known := self._book.contents.get(_content(entry))) is not None:
            self._writer.discard(entry)
            id, split, origin = known
            logger.warning(
                "%s: holds the same frames as %s (from %s): skipped", source.path, id, origin
            )
            self._found[number] = Outcome(source.path, "duplicate", id, split)
        else:
            split = self._split or self._book.split(source)
            if entry["attributes"]["split"] != split:
                self._writer.discard(entry)
                self._again.append(self._job(number, split))
                return False
            self._add(number, entry)
            self._out.popleft()
            return True
        self._out.popleft()
        # Those under way were given splits as if this one were added.
        self._ahead = self._book.ahead()
        for later in self._out:
            self._look_ahead(later)
        return True

    def _already(self, number: int) -> bool:
        """Whether the corpus has this file, treated in this way."""
        known = self._book.fingerprints.get(self._prints[number])
        if known is None:
            return False
        path = self._sources[number].path
        logger.info("%s: already there as %s", path, known[0])
        self._found[number] = Outcome(path, "already there", *known)
        return True

    def _add(self, number: int, entry: dict[str, Any]) -> None:
        source, about = self._sources[number], entry["attributes"]
        entry = {**entry, "id": self._book.name(source)}
        self._writer.commit(entry)
        self._book.add(entry)
        self._found[number] = Outcome(source.path, "added", entry["id"], about["split"])
        logger.info(
            "%s: added as %s (%s, %s frames of %s x %s, %s bit)",
            source.path,
            entry["id"],
            about["split"],
            *entry["shape"],
            about["bit_depth"],
        )


class _Book:
    """What a corpus has, and what the next recording becomes there."""

    def __init__(self, corpus: Corpus) -> None:
        self.ids: set[str] = set()
        self.fingerprints: dict[str, tuple[str, str]] = {}
        """id and split"""
        self.contents: dict[tuple, tuple[str, str, str]] = {}
        """id, split and source"""
        self.of_file: MutableMapping[tuple[str, str], str] = {}
        """split"""
        self.counts: Counter[str] = Counter()
        for video in corpus.videos:
            self.add(
                {
                    "id": video.id,
                    "shape": video.shape,
                    "dtype": video.dtype.name,
                    "lr_shape": video.lr_shape,
                    "attributes": video.info.__dict__,
                }
            )

    def add(self, entry: dict[str, Any]) -> None:
        """Take note of a video of the corpus."""
        id, about = entry["id"], entry["attributes"]
        split, source, more = about["split"], about["source"], about["metadata"]
        self.ids.add(id)
        self.contents.setdefault(_content(entry), (id, split, source))
        if "fingerprint" in more:
            self.fingerprints.setdefault(more["fingerprint"], (id, split))
        self.count((more.get("source_folder", ""), source), split)

    def count(self, file: tuple[str, str], split: str) -> None:
        """One more recording of this file (folder, name) in a split."""
        self.of_file.setdefault(file, split)
        self.counts[split] += 1

    def split(self, source: Source) -> str:
        """That of another recording of the same file, else the one furthest below its share."""
        known = self.of_file.get((source.folder, source.name))
        if known is not None:
            return known
        total = sum(self.counts.values()) + 1
        return max(SHARES, key=lambda part: round(SHARES[part] * total - self.counts[part], 9))

    def name(self, source: Source) -> str:
        """An id made of the file's name, unused in the corpus."""
        number, unique = 2, source.stem
        while unique in self.ids:
            unique, number = f"{source.stem}-{number}", number + 1
        return unique

    def ahead(self) -> _Book:
        """A copy to count in."""
        book = object.__new__(_Book)
        book.of_file, book.counts = ChainMap({}, self.of_file), Counter(self.counts)
        return book


def _content(entry: dict[str, Any]) -> tuple:
    """Equal for the same frames."""
    lr_shape = entry["lr_shape"]
    shapes = tuple(entry["shape"]), None if lr_shape is None else tuple(lr_shape)
    return entry["attributes"]["sha256"], *shapes, entry["dtype"]
