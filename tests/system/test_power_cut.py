"""A power cut at any moment: what was acknowledged is on the disk, whatever else of the last writes is there or not."""

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.chaos import new_provider
from tests.databases import check_integrity
from tests.ledgers import Ledger
from tests.power import Call, Disk, calls_in, record

CUTS = 36
TASKS = 3
PAGES = 1000
"""Pages in the write-ahead log after which SQLite moves them into the file: the record has to go beyond."""
PROGRAM = """
import sys
from pathlib import Path
from tests.chaos import flow_until_killed
class Nobody:
    def send(self, _): pass
flow_until_killed(Nobody(), sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
"""
SEED = 20


class Recording:
    """A server at work, recorded: its database before, and every write and sync after that."""

    def __init__(self, directory: Path, migrated: str) -> None:
        self.database, self.journal = directory / "oauth.db", directory / "journal"
        shutil.copy(migrated, self.database)
        self.before = {str(self.database): self.database.read_bytes()}
        wal, began = directory / "oauth.db-wal", self.database.stat().st_mtime_ns

        def enough() -> bool:
            moved = self.database.stat().st_mtime_ns != began
            return moved and wal.exists() and self.journal.exists()

        record(PROGRAM, [str(self.database), str(self.journal), str(TASKS)], directory.with_suffix(".log"), enough)
        self.calls = calls_in(directory.with_suffix(".log"), directory)

    def moments(self, chance: random.Random) -> list[int]:
        """Moments for cuts: a third of them while pages are moved into the file, and the last."""
        moving = [place for place, call in enumerate(self.calls) if call.path == str(self.database)]
        around = [chance.choice(moving) + chance.randrange(-3, 4) for _ in range(CUTS // 3)]
        anywhere = [chance.randrange(len(self.calls) // 5, len(self.calls)) for _ in range(CUTS - len(around) - 1)]
        return sorted([*around, *anywhere, len(self.calls)])

    async def check(self, files: dict[str, bytes], said: bytes, directory: Path) -> Counter[str]:
        """Start the computer again with these files, and hold the database against what was acknowledged."""
        directory.mkdir()
        for path, content in files.items():
            if path != str(self.journal):
                (directory / Path(path).name).write_bytes(content)
        journal = directory / "journal"
        journal.write_bytes(said)
        ledger, database = Ledger(), str(directory / "oauth.db")
        async with new_provider(database) as provider:
            await ledger.check(provider, journal)
        check_integrity(database)
        shutil.rmtree(directory)
        return ledger.counts


@pytest.fixture(scope="module")
def recording(migrated_sqlite: str, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """A server that was recorded until pages were moved into its file."""
    return Recording(tmp_path_factory.mktemp("power"), migrated_sqlite)


def said_by(calls: list[Call], journal: Path) -> bytes:
    """What was acknowledged before a moment."""
    return b"".join(call.data for call in calls if call.path == str(journal) and call.what == "write")


async def test_nothing_acknowledged_is_lost(
    recording: Recording, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the disk has kept nothing, everything or parts of what was not synced: every answer holds."""
    chance, counts = random.Random(SEED), Counter[str]()
    disk, done = Disk(recording.before), 0
    for number, moment in enumerate(recording.moments(chance)):
        for call in recording.calls[done:moment]:
            disk.make(call)
        done = moment
        said = said_by(recording.calls[:moment], recording.journal)
        files = disk.after_a_cut(chance, kept=(0, 0.5, 1)[number % 3])
        counts += await recording.check(files, said, tmp_path / str(number))
    assert counts["refresh acknowledged"] > 100
    with capsys.disabled():
        print(f"\n{CUTS} power cuts in {len(recording.calls)} calls:", end=" ")
        print(", ".join(f"{count} {what}" for what, count in sorted(counts.items()) if what != "kills"))


async def test_a_disk_that_does_not_sync_is_found_out(recording: Recording, tmp_path: Path) -> None:
    """On a disk that ignores syncs, answers are lost, and the check says so."""
    disk = Disk(recording.before, heeds_syncs=False)
    for call in recording.calls:
        disk.make(call)
    said = said_by(recording.calls, recording.journal)
    files = disk.after_a_cut(random.Random(SEED), kept=0)
    with pytest.raises(AssertionError, match="a registration that was acknowledged is lost"):
        await recording.check(files, said, tmp_path / "lost")
