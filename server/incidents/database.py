"""A database to keep incidents in: SQLite in one file, or PostgreSQL.

database = Database.of(settings, environ)
database.prepare()
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from guard.errors import ConfigError
from server.config.incidents import IncidentSettings

_BUSY_S = 5
_CONNECT_S = 3


class Database:
    """An engine of SQLAlchemy's, and how to bring the tables up to date."""

    def __init__(self, url: URL) -> None:
        self.url = url
        self.sqlite = url.get_backend_name() == "sqlite"
        arguments: dict[str, Any] = {"timeout": _BUSY_S} if self.sqlite else {"connect_timeout": _CONNECT_S}
        # Incidents hold what users wrote: parameters belong in no message.
        self.engine: Engine = create_engine(
            url, connect_args=arguments, hide_parameters=True, pool_pre_ping=not self.sqlite
        )
        if self.sqlite:
            event.listen(self.engine, "connect", _on_connect)

    @classmethod
    def of(cls, settings: IncidentSettings, environ: Mapping[str, str]) -> Database | None:
        """The one that the settings name; None where they name none. Raises ConfigError, never with the URL."""
        if settings.path is not None:
            return cls(URL.create("sqlite", database=str(settings.path)))
        if settings.url_env is None:
            return None
        return cls(_postgresql(settings.url_env, environ))

    @property
    def name(self) -> str:
        """For messages: without credentials."""
        return str(self.url.database) if self.sqlite else f"PostgreSQL at {self.url.host}/{self.url.database}"

    def prepare(self) -> None:
        """Make SQLite's file and tables, and say what is wrong with PostgreSQL's. Raises ConfigError.

        PostgreSQL is changed only by `undertow incidents migrate`: several servers use it. Where it cannot be reached
        now, that is no reason not to serve.
        """
        if self.sqlite:
            try:
                # SQLite would make it as readable as the umask says.
                os.close(os.open(str(self.url.database), os.O_CREAT | os.O_RDWR, 0o600))
                self.migrate()
            except (OSError, SQLAlchemyError) as error:
                raise ConfigError(
                    f"`incidents.path`: {self.name} cannot be used: {_reason(error)}; expected a place that can be "
                    "written, or null"
                ) from None
            return
        try:
            found = self.revision()
        except SQLAlchemyError:
            return
        if found != head():
            raise ConfigError(
                f"{self.name}: its tables are of version {found or 'none'}, expected {head()}; run `undertow incidents "
                "migrate --config FILE`"
            )

    def migrate(self) -> None:
        """Bring the tables up to date. Raises SQLAlchemyError."""
        with self.engine.begin() as connection:
            config = _alembic()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def revision(self) -> str | None:
        """What the tables are of; None where there are none. Raises SQLAlchemyError."""
        with self.engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision()

    def close(self) -> None:
        """End all connections."""
        self.engine.dispose()


def head() -> str:
    """The newest version of the tables."""
    newest = ScriptDirectory.from_config(_alembic()).get_current_head()
    assert newest is not None
    return newest


def _alembic() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _postgresql(variable: str, environ: Mapping[str, str]) -> URL:
    file = environ.get(f"{variable}_FILE")
    text = environ.get(variable)
    if (text is None) == (file is None):
        found = "neither is" if text is None else "both are"
        raise ConfigError(f"`incidents.url_env`: expected {variable} or {variable}_FILE to be set, {found}")
    if file is not None:
        try:
            text = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{variable}_FILE: {file} cannot be read: {type(error).__name__}") from None
    try:
        url = make_url(text or "")
    except (ArgumentError, ValueError):
        raise ConfigError(f"{variable}: is not a URL; expected postgresql://USER:PASSWORD@HOST/NAME") from None
    if url.get_backend_name() != "postgresql" or not url.database:
        raise ConfigError(f"{variable}: is not of a PostgreSQL database; expected postgresql://USER:PASSWORD@HOST/NAME")
    return url.set(drivername="postgresql+psycopg")


def _on_connect(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    # Readers do not wait for the writer, and a power cut loses no committed incident's file.
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(getattr(error, "orig", None) or type(error).__name__)
