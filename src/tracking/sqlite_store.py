"""A SQLite file as MLflow's store: made whole before any process sees it, and checked before MLflow opens it.

MLflow migrates a fresh file in place, in some sixty steps that no transaction holds together: a process that dies in
them leaves a file that MLflow can never open again. So a fresh store is made under another name and a lock, and
renamed. A file that exists is checked first; MLflow would migrate it in place too, or wait minutes for a lock.
"""

import math
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from filelock import FileLock, Timeout

from src.tracking.export_thread import OPENING_SECONDS
from src.tracking.exporters import DeliveryError, Warn, numbered
from src.util import sync

LOCKED_SECONDS = 2.0  # to wait for another process that writes to the file
COMPANIONS = ("-journal", "-wal", "-shm")
"""Files that SQLite keeps next to a database; one that belongs to another database would destroy this one."""
BROKEN_OFF = "_alembic_tmp_"  # how the names of the tables begin that a migration copies to
ELSEWHERE = "Move it away, or choose another tracking.uri"
AWAY = "or move it away: what MLflow lacks is then delivered to a new one"


@dataclass(frozen=True)
class _Found:
    """What a file holds."""

    is_empty: bool = False
    fault: str = ""  # why MLflow can't open it; '' where it can
    remedy: str = ""
    may_hold_runs: bool = True  # whether it may hold runs; else it may be replaced


class SqliteStore:
    """The file of a SQLite URI.

    Args:
        warn: called with what was done to a file that could not be used.
        check: called while another process is waited for, and before the file is made; raises where nobody waits.
    """

    def __init__(self, uri: str, warn: Warn, check: Callable[[], None] = lambda: None) -> None:
        from sqlalchemy.engine import make_url

        self._url = make_url(uri)
        dialect = self._url.get_dialect()()
        (name, *_), options = dialect.create_connect_args(self._url)
        self._is_file_uri = bool(options.get("uri"))
        if self._is_file_uri and name.startswith("file:"):
            name = unquote(name.removeprefix("file:").partition("?")[0])
        self.is_file = name not in ("", ":memory:") and "mode=memory" not in uri
        self._given = Path(name).absolute()
        self._warn = warn
        self._check = check
        if self.is_file:
            _keep_no_connections()
        self._seen: tuple[int, int] | None = None

    def open(self) -> bool:
        """Check that the file is a whole store that can be written to; make one where there is none.

        Returns: whether it is another file than at the last call. DeliveryError names what is wrong and what to do.
        """
        if not self.is_file:
            return False
        self._check_link()
        try:
            found = self._inspect_file()
            if found.is_empty or found.fault:
                self._make_anew()
            self._try_to_write()
            status = self.file.stat()
        except OSError as error:
            raise DeliveryError(f"{error.filename or self.file} can't be used: {error.strerror}") from error
        before, self._seen = self._seen, (status.st_dev, status.st_ino)
        return before not in (None, self._seen)

    @property
    def file(self) -> Path:
        """The file itself; where the URI has a link, what that leads to."""
        return Path(os.path.realpath(self._given))

    @property
    def _part_file(self) -> Path:
        """Where a new file is made."""
        return self.file.with_name(f".{self.file.name}.part")

    def _check_link(self) -> None:
        """Raise a DeliveryError where the file is a link to what is not there: whoever made it wanted it elsewhere."""
        if not self._given.is_symlink():
            return
        if not os.path.lexists(self.file):
            raise DeliveryError(
                f"{self._given} is a link to {self.file}, which is not there. Have that be there (is its disk "
                "mounted?), or remove the link: a new store is then made in its place"
            )
        if self.file.is_symlink():
            raise DeliveryError(
                f"{self._given} is a link that leads in a circle. Remove it, or choose another tracking.uri"
            )

    def is_being_made(self) -> bool:
        """Return whether this or another process is making the file, and has worked on it just now."""
        return _changed_ago(self._part_file, "", "-journal") < OPENING_SECONDS

    def _make_anew(self) -> None:
        """Make the store where the file is not there or empty, or was never made whole and holds no runs."""
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 - takes seconds, in which others would wait

        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self._lock():
            found = self._inspect_until_quiet()
            if not found.is_empty and not found.fault:
                return  # another process was faster
            if found.fault and found.may_hold_runs:
                raise DeliveryError(f"{self.file} {found.fault}. {found.remedy}")
            self._check()
            kept = self._move_away("half-made" if found.fault else "leftover")
            self._make()
            if found.fault:
                self._warn(f"{self.file} {found.fault}, and it held no runs: it was made anew. The old one is {kept}")

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold the store against other processes that would make it."""
        lock, waiting_since = FileLock(f"{self.file}.lock"), time.monotonic()
        while not lock.is_locked:
            self._check()
            try:
                lock.acquire(timeout=0.2)
            except Timeout as error:
                if self.is_being_made():
                    waiting_since = time.monotonic()
                elif time.monotonic() - waiting_since > OPENING_SECONDS:
                    held = f"{self.file}.lock is held by another process, which makes no store"
                    raise DeliveryError(held, is_lasting=False) from error
        try:
            yield
        finally:
            lock.release()

    def _inspect_until_quiet(self) -> _Found:
        """Inspect the file; one that can't be used, again until no process has changed it for a while."""
        while True:
            found = self._inspect_file()
            if not found.fault or _changed_ago(self.file, "", *COMPANIONS) > OPENING_SECONDS:
                return found
            self._check()
            time.sleep(0.2)

    def _inspect_file(self) -> _Found:
        """Return what the file holds; DeliveryError where it is no SQLite database that can be read."""
        try:
            mode = self.file.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return _Found(is_empty=True)
        for companion in (_companion(self.file, name) for name in COMPANIONS):
            if os.path.lexists(companion) and not companion.is_file():  # SQLite would read it before the database
                raise DeliveryError(f"{companion} is no plain file. {ELSEWHERE}")
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "no plain file"
            raise DeliveryError(f"{self.file} is {kind}, not a SQLite database. {ELSEWHERE}")
        try:
            with closing(self._connect()) as database:
                return self._inspect(database)
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise self._locked() from error
            raise DeliveryError(f"{self.file} can't be opened: {error}. {ELSEWHERE}") from error
        except sqlite3.DatabaseError as error:
            raise DeliveryError(f"{self.file} is damaged, or no SQLite database: {error}. {ELSEWHERE}") from error

    def _inspect(self, database: sqlite3.Connection) -> _Found:
        """Return what a database holds that can be read."""
        found = database.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        tables = {name for (name,) in found}
        if not tables:
            return _Found(is_empty=True)
        broken_off = sorted(name for name in tables if name.startswith(BROKEN_OFF))
        foreign = {name for name in tables if not name.startswith("alembic_")}
        if foreign and not broken_off and not tables & {"experiments", "runs"}:
            some = ", ".join(sorted(foreign)[:3])
            raise DeliveryError(f"{self.file} holds tables of something else ({some}): give MLflow a file of its own")
        with_runs = [table for table in ("runs", f"{BROKEN_OFF}runs") if table in tables]
        may_hold_runs = any(database.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() for table in with_runs)
        fault = "is a store that was never made whole (it has no version)"
        if broken_off:
            fault = f"is a store whose migration was broken off (it has a table {broken_off[0]})"
        elif "alembic_version" in tables:
            for (version,) in database.execute("SELECT version_num FROM alembic_version"):
                return _compare_version(str(version), self._url.render_as_string(), may_hold_runs=may_hold_runs)
        return _Found(fault=fault, remedy=f"Restore it from a copy, {AWAY}", may_hold_runs=may_hold_runs)

    def _try_to_write(self) -> None:
        """Raise a DeliveryError where another process has the file locked, or it can't be written."""
        try:
            with closing(self._connect()) as database:
                database.execute("BEGIN IMMEDIATE")
                database.execute("ROLLBACK")
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                raise self._locked() from error
            raise DeliveryError(f"{self.file} can't be written: {error}") from error

    def _locked(self) -> DeliveryError:
        return DeliveryError(f"{self.file} is locked by another process", is_lasting=False)

    def _connect(self) -> sqlite3.Connection:
        uri = f"file:{quote(str(self.file))}?mode=rw"
        return sqlite3.connect(uri, uri=True, timeout=LOCKED_SECONDS, isolation_level=None)

    def _make(self) -> None:
        """Make a store under another name, with all its tables, and rename it."""
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        for left in (self._part_file, *(_companion(self._part_file, name) for name in COMPANIONS)):
            left.unlink(missing_ok=True)  # of a process that died
        self._part_file.touch()
        database = f"file:{quote(str(self._part_file))}" if self._is_file_uri else str(self._part_file)
        url = self._url.set(database=database).render_as_string(hide_password=False)
        SqlAlchemyStore(url, (self.file.parent / "mlartifacts").as_uri()).engine.dispose()
        sync(self._part_file)
        os.replace(self._part_file, self.file)

    def _move_away(self, what: str) -> Path | None:
        """Rename the file and its companions, if there are any; return the file's new name."""
        names = _existing(self.file)
        kept = next(file for file in numbered(self.file, f".{what}") if not _existing(file))
        for name in names:
            os.replace(_companion(self.file, name), _companion(kept, name))
        return kept if names else None


def _keep_no_connections() -> None:
    """Make MLflow open a file anew for each call: a connection that is kept stays with a file that was replaced."""
    if not any(os.environ.get(f"MLFLOW_SQLALCHEMYSTORE_{name}") for name in ("POOL_SIZE", "MAX_OVERFLOW")):
        os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")


def _compare_version(version: str, uri: str, *, may_hold_runs: bool) -> _Found:
    """Return what it means for this MLflow that a store has a version."""
    import mlflow
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    known = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    if version == known.get_current_head():
        return _Found()
    try:
        known.get_revision(version)
    except CommandError:
        fault = f"is a store of a newer MLflow than {mlflow.__version__} (version {version})"
        return _Found(fault=fault, remedy="Install that MLflow, or choose another tracking.uri")
    fault = f"is a store of an older MLflow than {mlflow.__version__} (version {version})"
    remedy = f"Make a copy and run `mlflow db upgrade '{uri}'`, {AWAY}"
    return _Found(fault=fault, remedy=remedy, may_hold_runs=may_hold_runs)


def _companion(file: Path, ending: str) -> Path:
    return file.with_name(file.name + ending)


def _existing(file: Path) -> list[str]:
    """Return the endings of those files that are there of a database ('') and its companions."""
    return [ending for ending in ("", *COMPANIONS) if _companion(file, ending).exists()]


def _changed_ago(file: Path, *endings: str) -> float:
    """Return how many seconds ago the last of a database's files was changed; inf where there is none."""
    newest = -math.inf
    for ending in endings:
        with suppress(OSError):
            newest = max(newest, _companion(file, ending).stat().st_mtime)
    return max(0.0, time.time() - newest)
