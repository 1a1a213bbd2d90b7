"""A minute's look at shards that have no card: `mm doctor SHARDS`.

    shards ──some records──▶ what fields hold ──▶ a card ──▶ samples, for as long as there is time
                                                             ├─▶ bad ones with reasons, histograms
                                                             └─▶ packs, fill and GPU hours, scaled to all shards

Shards are read where they lie. Nothing in them is executed, and nothing is written anywhere.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
from rich.progress import BarColumn
from rich.table import Table

from mm import configure, media
from mm.data.cache import ShardCache
from mm.data.card import Card, CardError
from mm.data.guess import Field, Proposal, fields_of, propose
from mm.data.labels import place_name
from mm.data.mapping import reading_a_record
from mm.data.parquet import ParquetShard
from mm.data.shards import Place, Record, Scanned, Shard, is_remote, open_shard
from mm.data.unread import unread_lines
from mm.media import BrokenMedia, ImageFacts, SpeechFacts
from mm.packing.fit import best_fit
from mm.sample import BrokenSample, MediaPart, Sample, Text, encodable
from mm.terminal import Progress, printable
from mm.tokenizers.text import TextTokenizer, TokenizerOptions
from mm.train.meter import datasheet_flops
from mm.train.preview import spoken

PEEKED = 64
"""Records of a shard from which its fields are guessed."""
SPREAD = 16
"""Shards among which the time is divided."""
CHARACTERS_PER_TOKEN = 4
SPEECH_TOKENS = 25
"""Tokens a second of recording: what an encoder of 50 Hz with an adapter of stride 2 gives."""
CLOUD_TOKENS = 64
"""Tokens a point cloud: as many groups."""
MFU = 0.4
SHOWN = 8
"""Kinds of bad samples, and shards of the proposed card, that are listed."""

_FORMATS = {".tar": "webdataset", ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_WIDTH = 32  # letters of the longest bar of a histogram


class LookError(ValueError):
    """Shards that cannot be looked at; the message says which and why."""


@dataclass(frozen=True)
class LookOptions:
    """What a look assumes, and when it ends.

    capacity: tokens of a pack
    tokenizer: preset, folder or hub name; None estimates tokens by characters
    image_tokens: tokens a picture
    parameters: of the model
    seconds, samples: the look ends after so many, whichever is first
    """

    capacity: int = 4096
    tokenizer: str | None = None
    image_tokens: int = 256
    parameters: float = 2e9
    seconds: float = 60.0
    samples: int = 10_000

    def __post_init__(self) -> None:
        for name in ("capacity", "parameters", "seconds", "samples"):
            if not getattr(self, name) > 0:
                raise LookError(f"{name} is {getattr(self, name)}, it must be above 0")
        if self.image_tokens < 0:
            raise LookError(f"image_tokens is {self.image_tokens}, it cannot be below 0")


@dataclass
class Look:
    """What was seen.

    shards: all of them; opened: how many were read from; bytes: their share of all bytes that was read, an estimate
    fields: of the records; records: from which they were guessed
    lengths: tokens of the good samples; text: of their words alone; images: (width, height); seconds: of recordings
    bad: records that are no samples by reason, with the place of the first
    """

    options: LookOptions
    card: Card
    written: tuple[str, ...]
    proposal: Proposal
    shards: tuple[str, ...]
    fields: list[Field]
    peeked: int
    opened: int = 0
    share: float = 0.0
    elapsed: float = 0.0
    lengths: list[int] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    images: list[ImageFacts] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    clouds: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    first_bad: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.unread = self.card.unread_files()

    @property
    def seen(self) -> int:
        """Records that were read, bad ones too."""
        return len(self.lengths) + self.bad.total()

    def report(self) -> Iterator[Table | str]:
        """Tables, and the proposed card as text that is to be copied, in the order in which one reads them."""
        yield self._seen_table()
        yield self._fields_table()
        yield f"\nA card that reads them; fill in what is TODO, save it as {self.card.path.name} here:\n"
        yield self.card_yaml()
        if self.unread is not None and (found := self.unread.found()):
            yield "\n".join(["", "files that this card does not read:", *unread_lines(found), ""])
        if self.bad:
            yield self._bad_table()
        if self.lengths:
            counted = "tokens" if self.options.tokenizer else f"tokens, ESTIMATED: characters / {CHARACTERS_PER_TOKEN}"
            yield _histogram(f"text of a sample in {counted}", np.array(self.text), "")
        if self.images:
            yield _histogram("longer side of the pictures", np.array([max(size) for size in self.images]), " px")
        if self.seconds:
            yield _histogram("length of the recordings", np.array(self.seconds), " s")
        if self.lengths:
            yield self._packs_table()

    def card_yaml(self) -> str:
        """The proposed card. Its paths are relative to the working directory, where it is to be saved."""
        card = {
            "name": self.card.name,
            "licence": "TODO",
            "origin": "TODO where and how you got it",
            "format": self.card.format,
            "splits": {"train": {"shards": list(self.written)}},
            "sample": self.proposal.sample,
        }
        remarks = "".join(f"# {printable(remark, 400)}\n" for remark in self.proposal.remarks)
        return remarks + configure.write_yaml(card)

    def _seen_table(self) -> Table:
        table = Table("figure", title="what was seen", title_justify="left")
        table.add_column("value")
        table.add_row("shards", f"{self.opened:,} of {len(self.shards):,}, {self.card.format}")
        table.add_row("records", f"{self.seen:,}, " + ("all" if self.share == 1 else f"about {self.share:.2%} of all"))
        if self.share < 1:
            table.add_row("records in all", f"about {self._scaled(self.seen):,.0f}")
        table.add_row("bad records", f"{self.bad.total():,} ({self.bad.total() / max(self.seen, 1):.2%})")
        if self.unread is not None and (number := self.unread.files.total()):
            table.add_row("files not read", f"{number:,}, of kinds that are listed below")
        table.add_row("time", spoken(self.elapsed))
        return table

    def _fields_table(self) -> Table:
        table = Table("field", title=f"fields, in the first {self.peeked:,} records", title_justify="left")
        table.add_column("in", justify="right")
        table.add_column("holds")
        table.add_column("such as", overflow="fold")
        for one in self.fields[:32]:
            table.add_row(printable(one.path), f"{one.number / self.peeked:.0%}", one.kind, printable(one.example, 60))
        if len(self.fields) > 32:
            table.add_row(f"… {len(self.fields) - 32:,} more", "", "", "")
        return table

    def _bad_table(self) -> Table:
        table = Table("reason", title="bad samples", title_justify="left")
        table.add_column("records", justify="right")
        table.add_column("the first", overflow="fold")
        for reason, number in self.bad.most_common(SHOWN):
            table.add_row(printable(reason), f"{number:,}", self.first_bad[reason])
        return table

    def _packs_table(self) -> Table:
        options = self.options
        lengths = np.array(self.lengths)
        fitting = lengths[lengths <= options.capacity]
        table = Table("figure", title=f"packs of {options.capacity:,} tokens", title_justify="left")
        table.add_column("value", justify="right")
        table.caption, table.caption_justify = self._assumptions(), "left"
        table.add_row("tokens of a sample", f"{lengths.mean():,.0f} on average, at most {lengths.max():,}")
        table.add_row("too long for a pack", f"{len(lengths) - len(fitting):,} ({1 - len(fitting) / len(lengths):.2%})")
        if not len(fitting):
            return table
        packs = best_fit(fitting, options.capacity).number
        whole = self._scaled(packs)
        tokens = whole * options.capacity
        table.add_row("packs" if self.share == 1 else "packs, scaled to all records", f"{max(whole, 1):,.0f}")
        table.add_row("fill", f"{fitting.sum() / (packs * options.capacity):.1%}")
        table.add_row("samples in a pack", f"{len(fitting) / packs:,.1f}")
        table.add_row("tokens of an epoch", f"{self._scaled(int(fitting.sum())):,.0f}")
        flops = 6 * options.parameters * tokens
        for name in ("A100", "H100"):
            peak = datasheet_flops(name)
            assert peak is not None
            table.add_row(f"an epoch on one {name}", spoken(flops / (MFU * peak)))
        return table

    def _assumptions(self) -> str:
        options = self.options
        parts = [f"text by {options.tokenizer}" if options.tokenizer else "text ESTIMATED by characters"]
        if self.images:
            parts.append(f"{options.image_tokens} tokens a picture (--image-tokens)")
        if self.seconds:
            parts.append(f"{SPEECH_TOKENS} tokens a second of speech")
        if self.clouds:
            parts.append(f"{CLOUD_TOKENS} tokens a point cloud")
        cost = f"{options.parameters / 1e9:g}B parameters, 6 FLOPs each and token, {MFU:.0%} MFU"
        return printable(f"assumed: {', '.join(parts)}; {cost}, attention and encoders not counted", 400)

    def _scaled(self, number: float) -> float:
        return number / self.share if self.share else number


# ------------------------------------------------------------------------------------------------------------ looking


def look(patterns: Sequence[str], options: LookOptions, cache: ShardCache | None = None, progress: bool = True) -> Look:
    """Looks at shards until there is no more time.

    Args:
        patterns: paths, globs, ``{0000..0099}`` ranges and URLs, as in a card.
        cache: keeps remote shards, which are then transferred whole, however long that takes.

    Raises:
        LookError: no such shards, of several formats, they cannot be read, or nothing in them can be learned.
    """
    try:
        return _look(patterns, options, cache, progress)
    except OSError as error:  # of a disk or a network, or a file that is not there
        raise LookError(f"the shards cannot be read: {error}") from error


def _look(patterns: Sequence[str], options: LookOptions, cache: ShardCache | None, progress: bool) -> Look:
    started = time.monotonic()
    shards, written = expand(patterns)
    format = _format(shards)
    count = _text_counter(options.tokenizer)
    peeked = _peek(shards, format, started + options.seconds / 4)
    if not peeked:
        raise LookError(f"{shards[0]}: no record in it, nor in {min(len(shards), 3) - 1} others, can be read")
    records = [record.fields for record in peeked]
    fields = fields_of(records)
    proposal = propose(fields, records)
    if proposal is None:
        found = "; ".join(f"{printable(one.path, 40)}: {one.kind}" for one in fields[:32]) or "nothing"
        raise LookError(f"{shards[0]}: no field holds words to learn, so no card can be proposed. Fields: {found}")
    card = Card(
        name=re.sub(r"\W+", "-", PurePosixPath(written[0]).name.partition(".")[0]).strip("-") or "mine",
        licence="TODO",
        origin="TODO",
        format=format,
        splits={"train": written},
        sample_form=proposal.sample,
        path=Path.cwd() / "card.yaml",
        cache=cache,
    )
    seen = Look(options, card, written, proposal, tuple(shards), fields, len(records))
    _read(seen, count, started, progress)
    seen.elapsed = time.monotonic() - started
    return seen


def expand(patterns: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Paths and URLs of all shards, and the patterns as a card in the working directory would have them."""
    for pattern in patterns:
        if not is_remote(pattern) and Path(pattern).expanduser().is_dir():
            inside = sorted({path.suffix for path in Path(pattern).expanduser().iterdir() if path.suffix in _FORMATS})
            hint = f"'{pattern.rstrip('/')}/*{inside[0]}'" if inside else "the files in it, such as 'FOLDER/*.tar'"
            raise LookError(f"{pattern} is a folder; give {hint}")
    written = tuple(_as_ranges(patterns))
    card = Card("", "", "", "webdataset", {"train": written}, [{"text": "txt"}], Path.cwd() / "card.yaml")
    try:
        shards = card.shards("train")
    except CardError as error:  # names a card that does not exist
        raise LookError(str(error).removeprefix(f"{card.path}: ")) from error
    if not shards:
        raise LookError("no shard was named")
    return shards, written


def _as_ranges(patterns: Sequence[str]) -> Iterator[str]:
    """Patterns in order, runs of numbered files as one ``{0000..0099}``: a shell expands globs into thousands."""
    parsed = [re.fullmatch(r"(.*?)(\d+)(\D*)", pattern) for pattern in patterns]
    start = 0
    while start < len(patterns):
        stop, first = start + 1, parsed[start]
        while first and stop < len(patterns) and _follows(first, parsed[stop], stop - start):
            stop += 1
        if first and stop - start > 2:
            yield f"{first[1]}{{{first[2]}..{patterns[stop - 1][len(first[1]) :][: len(first[2])]}}}{first[3]}"
        else:
            yield from patterns[start:stop]
        start = stop


def _follows(first: re.Match[str], other: re.Match[str] | None, by: int) -> bool:
    if other is None or (first[1], first[3]) != (other[1], other[3]):
        return False
    return len(first[2]) == len(other[2]) and int(other[2]) == int(first[2]) + by


def _format(shards: Sequence[str]) -> str:
    formats = {_FORMATS.get(PurePosixPath(shard.partition("?")[0]).suffix.lower()) for shard in shards}
    if len(formats) != 1 or None in formats:
        odd = [shard for shard in shards if PurePosixPath(shard.partition("?")[0]).suffix.lower() not in _FORMATS]
        if odd:
            raise LookError(f"{odd[0]}: shards end in {', '.join(_FORMATS)}")
        raise LookError("the shards are of several formats; look at one at a time")
    return formats.pop() or ""


def _peek(shards: Sequence[str], format: str, until: float) -> list[Record]:
    """The first records of the first, the middle and the last shard."""
    records: list[Record] = []
    for shard in dict.fromkeys((shards[0], shards[len(shards) // 2], shards[-1])):
        opened = open_shard(shard, format)
        scanned = itertools.islice(opened.scan(), PEEKED)
        for one in scanned:
            if one.record is not None:
                records.append(one.record)
            if records and time.monotonic() > until:
                break
        opened.close()
    return records


def _spread(number: int) -> list[int]:
    """Shard numbers in an order of which every beginning is spread over all (van der Corput)."""
    bits = max(number - 1, 1).bit_length()
    reversed_ = (int(f"{one:0{bits}b}"[::-1], 2) for one in range(2**bits))
    return [one for one in reversed_ if one < number]


def _read(seen: Look, count: Callable[[Sample], int], started: float, progress: bool) -> None:
    """Reads shard after shard, each for its share of the time and of the samples, until one of them is spent."""
    options, number = seen.options, len(seen.shards)
    parts = min(number, SPREAD)
    quota = -(-options.samples // parts)
    begin, shares, sizes = time.monotonic(), 0.0, 0
    columns = ("looking", BarColumn(), "{task.fields[seen]:,} records")
    with Progress(*columns, transient=True, disable=not progress) as bar:
        task = bar.add_task("", total=options.seconds, seen=0)
        for turn, which in enumerate(_spread(number)):
            left = options.seconds - (time.monotonic() - started)
            if turn and (left <= 0 or seen.seen >= options.samples):
                break
            allowed = max(started + options.seconds - begin, 0) * (turn + 1) / parts
            until = min(started + options.seconds, begin + allowed)
            most = min(seen.seen + quota, options.samples)
            shard = seen.shards[which]
            opened = seen.card.open(shard, seen.card.stat(shard))
            extent = _Extent(opened)
            read = 0.0
            for scanned in opened.scan():
                _add(seen, count, opened, scanned)
                bar.update(task, completed=time.monotonic() - started, seen=seen.seen)
                if seen.seen >= most or time.monotonic() > until:
                    read = extent.share(scanned.place)
                    break
            else:
                read = 1.0
            opened.close()
            seen.opened, shares, sizes = seen.opened + 1, shares + read * extent.size, sizes + extent.size
    seen.share = min(1.0, shares / max(sizes, 1) * seen.opened / number)


class _Extent:
    """How large a shard is: size in bytes, and rows before every row group of a parquet file."""

    def __init__(self, shard: Shard) -> None:
        self.size = shard.file.stat().size
        self._starts: list[int] | None = None
        if isinstance(shard, ParquetShard):
            with suppress(pa.ArrowException, OSError, ValueError):  # a damaged file, which the scan reports
                self._starts = shard.starts

    def share(self, place: Place) -> float:
        """How much of the shard lies before the end of a place, 0 to 1: of its rows, or of its bytes."""
        first, second = place
        if self._starts is not None:
            return (self._starts[first] + second + 1) / max(self._starts[-1], 1)
        return min(1.0, (first + second) / max(self.size, 1))


def _add(seen: Look, count: Callable[[Sample], int], shard: Shard, scanned: Scanned) -> None:
    """Counts a record: decodes its media, measures its text."""
    reason = scanned.error
    if scanned.record is not None:
        if seen.unread is not None:
            seen.unread.add(scanned.key, scanned.record.fields)
        try:
            sample = seen.card.sample(scanned.record)
            with reading_a_record():
                items = [_whole(part) for part in sample.media]
            text = count(sample)
        except BrokenMedia as broken:
            reason = f"broken media: {broken}"
        except BrokenSample as broken:
            reason = str(broken)
        else:
            _measure(seen, text, items)
            return
    kind, _, detail = encodable(reason or "no record").partition(":")
    seen.bad[kind] += 1
    name = place_name(shard.path, scanned.key)
    seen.first_bad.setdefault(kind, f"{name}, {printable(detail.strip(), 120)}" if detail else name)


def _whole(part: MediaPart) -> media.Facts:
    """Facts of a file that can be decoded. Kept together, the decoded pictures of a long page would fill the memory."""
    facts = media.facts(part)
    media.decode(part)
    return facts


def _measure(seen: Look, text: int, items: list[media.Facts]) -> None:
    length = text
    for facts in items:
        if isinstance(facts, ImageFacts):
            seen.images.append(facts)
            length += seen.options.image_tokens
        elif isinstance(facts, SpeechFacts):
            seen.seconds.append(facts.frames / facts.rate)
            length += math.ceil(seen.seconds[-1] * SPEECH_TOKENS)
        else:
            seen.clouds += 1
            length += CLOUD_TOKENS
    seen.text.append(text)
    seen.lengths.append(max(length, 1))


def _text_counter(tokenizer: str | None) -> Callable[[Sample], int]:
    """Text tokens of a sample; without a tokenizer an estimate, one more for the end of the document."""
    if tokenizer is None:
        return lambda sample: 1 + math.ceil(_characters(sample) / CHARACTERS_PER_TOKEN)
    if tokenizer.endswith((".yaml", ".yml")):
        loaded = TextTokenizer.load(configure.load(TokenizerOptions, tokenizer))
    else:
        loaded = TextTokenizer.load(tokenizer)
    return lambda sample: int(loaded.lengths([sample])[0])


def _characters(sample: Sample) -> int:
    return sum(len(part.text) for part in sample.parts if isinstance(part, Text))


def _histogram(title: str, values: np.ndarray, unit: str) -> Table:
    """How many values lie in each range between powers of two."""
    table = Table("from", title=title, title_justify="left")
    table.add_column("samples" if not unit else "number", justify="right")
    table.add_column("share", justify="right")
    table.add_column("")
    exponents = np.floor(np.log2(np.maximum(values, 2.0**-4))).astype(int)
    counts = Counter(exponents.tolist())
    for exponent in range(min(counts), max(counts) + 1):
        share = counts[exponent] / len(values)
        bar = "█" * round(_WIDTH * counts[exponent] / max(counts.values()))
        table.add_row(f"{2.0**exponent:,g}{unit}", f"{counts[exponent]:,}", f"{share:.1%}", bar)
    middle, most = np.median(values), values.max()
    table.caption, table.caption_justify = f"median {middle:,.4g}{unit}, largest {most:,.4g}{unit}", "left"
    return table
