"""One connection to PostgreSQL: opening it, bringing the tables up to date, and what its failures mean."""

import asyncio
import hashlib
import random
import re
from collections.abc import Iterator
from typing import Any, Literal

try:
    import asyncpg
except ImportError as error:
    raise ImportError("PostgresCheckpointStore needs asyncpg: install cano[postgres]") from error

from . import _postgres_sql as sql
from ._errors import ConfigurationError, StoreFailedError, StoreOpenError, show

_LOST: tuple[type[BaseException], ...] = (
    OSError,  # TimeoutError is one
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,  # the server goes down, or somebody has cancelled the statement
    asyncpg.InsufficientResourcesError,
    asyncpg.ReadOnlySQLTransactionError,  # a fail-over has made it a standby
    asyncpg.CannotConnectNowError,
    asyncpg.InternalClientError,
)
_AGAIN: tuple[type[BaseException], ...] = (asyncpg.SerializationError, asyncpg.DeadlockDetectedError)
_BUSY: tuple[type[BaseException], ...] = (asyncpg.LockNotAvailableError, asyncpg.QueryCanceledError)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0

_LONGEST_READ = 60.0
"""Seconds that the answer to a question may take."""

FIRST_LIMIT = 10.0
"""Seconds that the first connection may take."""

Verdict = Literal["lost", "again", "busy", "refused"]


def verdict(error: BaseException) -> Verdict:
    """What the failure of a statement means.

    The connection is of no use any more; do it once more; somebody else holds what it needs; or it is refused.
    """
    if isinstance(error, _BUSY):
        return "busy"
    if isinstance(error, asyncpg.DiskFullError):
        return "refused"
    if isinstance(error, _LOST):
        return "lost"
    if isinstance(error, asyncpg.InterfaceError) and not isinstance(error, ValueError):  # the connection is closed
        return "lost"
    return "again" if isinstance(error, _AGAIN) else "refused"


def failed(error: BaseException, workflow_id: str | None = None) -> StoreFailedError:
    """The error of cano for a statement that was refused."""
    if isinstance(error, asyncpg.DiskFullError):
        reason = "disk-full"
    elif isinstance(error, asyncpg.DataCorruptedError | asyncpg.IndexCorruptedError):
        reason = "damaged"
    elif isinstance(error, _BUSY):
        reason = "busy"
    else:
        reason = "io" if verdict(error) == "lost" else "other"
    return StoreFailedError(f"PostgreSQL failed: {text_of(error)}", workflow_id, reason=reason)


def cannot_open(error: Exception, dsn: str) -> StoreOpenError:
    """The error of cano for a store whose first connection fails."""
    if isinstance(error, StoreOpenError):
        return error
    reason = "io" if verdict(error) == "lost" else "other"
    found = StoreOpenError(f"cannot open {without_password(dsn)}: {text_of(error)}", reason)
    found.__cause__ = error
    return found


def text_of(error: BaseException) -> str:
    """What an error says; its class where it says nothing."""
    return str(error) or type(error).__name__


def without_password(dsn: str) -> str:
    """The address as messages may show it."""
    hidden = re.sub(r"://([^:@]*):.*@", r"://\1:***@", dsn)
    return re.sub(r"(?i)(password=)[^&\s]*", r"\1***", hidden)


def pauses(lease: float) -> Iterator[float]:
    """Seconds before a lost connection is opened again: longer and longer, but several times a lease."""
    pause = _FIRST_PAUSE
    while True:
        yield pause * random.uniform(0.5, 1.0)  # noqa: S311 - so that not all come back at once
        pause = min(2 * pause, _LONGEST_PAUSE, lease / 8)


class Connection:
    """A connection to the tables of one schema."""

    def __init__(self, connection: Any, schema: str) -> None:
        self._connection = connection
        self._schema = f'"{schema}"'
        self._prepared: dict[str, Any] = {}
        self.sync = "on"
        """The setting with which a commit waits for the disk."""

    @classmethod
    async def open(cls, dsn: str, schema: str, *, limit: float, settings: str = "") -> "Connection":
        """A connection whose tables are of the version that this module knows.

        Args:
            dsn: Where to.
            schema: The name of the schema, checked.
            limit: Seconds that connecting may take, and each later statement of `fetch`.
            settings: Statements to begin with.

        Raises:
            StoreOpenError: The tables are of a later version, or cannot be made.
            Exception: What asyncpg raises.
        """
        async with asyncio.timeout(limit):
            opened = cls(await asyncpg.connect(dsn, statement_cache_size=0), schema)
            try:
                if settings:
                    await opened._connection.execute(settings)
                    opened.sync = await opened._value(sql.SYNC)
                await opened._bring_up_to_date()
            except BaseException:
                opened.terminate()
                raise
        return opened

    async def fetch(self, name: str, *arguments: object, limit: float | None = None) -> list[Any]:
        """What a statement of `_postgres_sql` returns; it is prepared once."""
        async with asyncio.timeout(limit):
            prepared = self._prepared.get(name)
            if prepared is None:
                statement = self._written(getattr(sql, name))
                prepared = self._prepared[name] = await self._connection.prepare(statement, name=f"cano_{name.lower()}")
            found: list[Any] = await prepared.fetch(*arguments)
            return found

    async def close(self) -> None:
        """Say good-bye to the server, which must take it within a second."""
        try:
            async with asyncio.timeout(1):
                await self._connection.close()
        except Exception:  # noqa: BLE001, S110 - it is of no use any more
            pass
        finally:
            self.terminate()

    def terminate(self) -> None:
        self._connection.terminate()

    def _written(self, statement: str) -> str:
        return statement.replace("{schema}", self._schema)

    async def _value(self, statement: str, *arguments: object) -> Any:
        return await self._connection.fetchval(self._written(statement), *arguments)

    async def _version(self) -> int:
        if not await self._value(sql.HAS_VERSIONS):
            return 0
        return int(await self._value(sql.STORED_VERSION))

    async def _bring_up_to_date(self) -> None:
        version = await self._version()
        if version < sql.VERSION:
            try:
                version = await self._migrate()
            except asyncpg.InsufficientPrivilegeError as error:
                raise StoreOpenError(
                    f"the tables of schema {self._schema} are missing or old, and this user may not make them: {error}; "
                    "open the store once as a user who may, or grant CREATE on the database"
                ) from error
        if version > sql.VERSION:
            raise StoreOpenError(
                f"schema {self._schema} is of version {version}, and this version of cano knows {sql.VERSION}: update cano",
                "version",
            )

    async def _migrate(self) -> int:
        """Several that come first at once wait for the first of them, and find nothing left to do."""
        async with self._connection.transaction():
            await self._value(sql.LOCK_MIGRATIONS, _number(self._schema))
            if not await self._value(sql.HAS_SCHEMA):
                await self._value(sql.CREATE_SCHEMA)
            await self._value(sql.CREATE_VERSIONS)
            version = int(await self._value(sql.STORED_VERSION))
            for step in range(version + 1, sql.VERSION + 1):
                await self._connection.execute(self._written(sql.MIGRATIONS[step]))
                await self._value(sql.ADD_VERSION, step)
        return max(version, sql.VERSION)


class Reader:
    """A connection for one question at a time, opened when there is one."""

    def __init__(self, dsn: str, schema: str, *, patience: float) -> None:
        self._dsn = dsn
        self._schema = schema
        self._patience = patience
        self._turn = asyncio.Lock()
        self._connection: Connection | None = None

    async def read(self, statement: str, *arguments: object, fails_fast: bool) -> list[Any]:
        """What the statement returns; a connection that is lost is opened again for as long as the patience lasts.

        Raises:
            StoreOpenError: The tables cannot be used; if it `fails_fast`, also that the server cannot be reached.
            StoreFailedError: The database failed, or could not be reached.
        """
        deadline = asyncio.get_running_loop().time() + self._patience
        async with self._turn:
            for pause in pauses(self._patience):
                is_open = self._connection is not None
                try:
                    return await self._ask(statement, *arguments)
                except Exception as error:
                    if not is_open and fails_fast:
                        raise cannot_open(error, self._dsn) from error
                    if isinstance(error, StoreOpenError):
                        raise
                    if verdict(error) != "lost" or asyncio.get_running_loop().time() >= deadline:
                        raise failed(error) from error
                await asyncio.sleep(pause)
        raise AssertionError("the pauses have no end")

    async def _ask(self, statement: str, *arguments: object) -> list[Any]:
        if self._connection is None:
            self._connection = await Connection.open(self._dsn, self._schema, limit=FIRST_LIMIT)
        try:
            return await self._connection.fetch(statement, *arguments, limit=_LONGEST_READ)
        except BaseException as error:
            if not isinstance(error, Exception) or verdict(error) == "lost":
                self._connection.terminate()
                self._connection = None
            raise

    async def aclose(self) -> None:
        """Wait for the question under way, and disconnect."""
        async with self._turn:
            connection, self._connection = self._connection, None
            if connection is not None:
                await connection.close()


def _number(schema: str) -> int:
    """The key of the advisory lock."""
    return int.from_bytes(hashlib.sha256(f"cano {schema}".encode()).digest()[:8], "big", signed=True)


def check_dsn(dsn: Any) -> str:
    """The address, if it is one."""
    if not isinstance(dsn, str):
        raise ConfigurationError(f"dsn must be a text, got {show(dsn)}")
    if not dsn.startswith(("postgresql://", "postgres://")):
        raise ConfigurationError(f"dsn must begin with postgresql://, got {show(without_password(dsn))}")
    return dsn


def check_schema(schema: Any) -> str:
    """The name, if it can be one of a schema: PostgreSQL keeps 63 bytes, and pg_ is its own."""
    if not isinstance(schema, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,62}", schema):
        rule = "a name of 1 to 63 letters, digits and underscores that does not begin with a digit"
        raise ConfigurationError(f"schema must be {rule}, got {show(schema)}")
    if schema.startswith("pg_"):
        raise ConfigurationError(f"schema must not begin with pg_, which is PostgreSQL's own, got {show(schema)}")
    return schema
