"""Users of a test's database with the rights of a group role."""

import uuid
from collections.abc import Callable, Iterator
from contextlib import closing

import psycopg
import pytest
from psycopg import sql

from fhir_assets.warehouse.postgres.db.connections import connect

User = Callable[[str], str]
"""A function that creates a user with a role and returns the URL of the database for that user."""


@pytest.fixture
def user(database: str) -> Iterator[User]:
    """Create users with a role; they are dropped after the test."""
    created = []

    def create(role: str) -> str:
        name = f"user_{uuid.uuid4().hex}"
        with connect(database, autocommit=True) as conn:
            conn.execute(sql.SQL("CREATE ROLE {} LOGIN IN ROLE {}").format(sql.Identifier(name), sql.Identifier(role)))
        created.append(name)
        return database.replace("postgres@", f"{name}@")

    yield create
    with connect(database, autocommit=True) as conn:
        for name in created:
            conn.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(name)))
            conn.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


def is_refused(url: str, statement: str) -> bool:
    with closing(connect(url)) as conn:
        try:
            conn.execute(statement.encode())
        except psycopg.errors.InsufficientPrivilege:
            return True
    return False
