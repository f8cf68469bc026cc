"""The state of a source belongs to settings, a store and a database; a load under others is refused."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fhir_assets.deployment.sources import build_binding, describe_server, list_bound_settings
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.pipeline.sources.binding import SourceBinding
from fhir_assets.pipeline.sources.transition import SourceTransition, TransitionResult
from fhir_assets.settings import Settings, load_settings
from fhir_assets.storage.marker import MARKER, StoreMarker, read_marker
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import sources
from fhir_assets_tests.support.databases import fresh_database

Make = Callable[..., SourceBinding]

SERVER = {"fhir_base_url": "https://one.example/fhir", "fhir_partition": "daily"}


@pytest.fixture
def configure(database: str, tmp_path: Path) -> Callable[..., Settings]:
    def make(**values: Any) -> Settings:
        return load_settings(**{"db_url": database, "fhir_assets_home": tmp_path / "home", **SERVER, **values})

    return make


@pytest.fixture
def binding(configure: Callable[..., Settings]) -> Make:
    def make(**values: Any) -> SourceBinding:
        settings = configure(**values)
        return build_binding(settings, Warehouse(settings))

    return make


def carry_over(settings: Settings) -> TransitionResult:
    warehouse = Warehouse(settings)
    binding = build_binding(settings, warehouse)
    return SourceTransition(binding, warehouse.connect, binding.store, actor="test").carry_over()


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """Expect a refusal that contains the words and names both ways on."""
    with pytest.raises(ConfigurationError) as caught:
        yield
    for word in (*words, "fhir-assets sources carry-over", "fhir-assets sources start-anew"):
        assert word in str(caught.value)


def test_the_first_load_binds_its_settings_and_later_loads_with_them_pass(binding: Make) -> None:
    binding().require(fetches=True)
    binding().require(fetches=True)
    binding().require()


@pytest.mark.parametrize("moment", ["before the marker is read", "after the marker is read"])
@pytest.mark.parametrize("other", [{}, {"fhir_partition": "monthly"}])
def test_two_processes_that_load_for_the_first_time_at_once_bind_one_source(
    binding: Make, monkeypatch: pytest.MonkeyPatch, moment: str, other: dict[str, Any]
) -> None:
    pending = [binding(**other)]

    def read(store: Store) -> StoreMarker | None:
        early = read_marker(store) if moment.startswith("after") else None
        while pending:
            pending.pop().require(fetches=True)
        return read_marker(store) if moment.startswith("before") else early

    monkeypatch.setattr("fhir_assets.pipeline.sources.binding.read_marker", read)
    if other:
        with refused("FHIR_PARTITION was monthly"):
            binding().require(fetches=True)
    else:
        binding().require(fetches=True)
    binding(**other).require(fetches=True)


@pytest.mark.parametrize(
    ("first", "changed", "name"),
    [
        ({}, {"fhir_base_url": "https://two.example/fhir"}, "FHIR_BASE_URL"),
        ({}, {"fhir_partition": "monthly"}, "FHIR_PARTITION"),
        ({}, {"fhir_source": "bulk"}, "FHIR_SOURCE"),
        ({}, {"fhir_source": "ndjson", "fhir_base_url": "/data"}, "FHIR_SOURCE"),
        ({}, {"fhir_last_updated_gte": "2024-01-01"}, "FHIR_LAST_UPDATED_GTE"),
        ({"fhir_last_updated_gte": "2024-01-02"}, {"fhir_last_updated_gte": "2024-01-01"}, "FHIR_LAST_UPDATED_GTE"),
        ({"fhir_last_updated_gte": "2024-01-02"}, {"fhir_last_updated_gte": "2024-01-03"}, "FHIR_LAST_UPDATED_GTE"),
        ({"fhir_last_updated_gte": "2024-01-02"}, {}, "FHIR_LAST_UPDATED_GTE"),
        ({"fhir_source": "bulk"}, {"fhir_source": "bulk", "fhir_bulk_level": "group/1"}, "FHIR_BULK_LEVEL"),
        (
            {"fhir_source": "bulk"},
            {"fhir_source": "bulk", "fhir_bulk_type_filter": "Observation?category=laboratory"},
            "FHIR_BULK_TYPE_FILTER",
        ),
        ({}, {"fhir_auth_scope": "system/Observation.rs?category=laboratory"}, "FHIR_AUTH_SCOPE"),
    ],
)
def test_a_setting_whose_change_makes_the_state_false_is_refused_and_named(
    binding: Make, first: dict[str, Any], changed: dict[str, Any], name: str
) -> None:
    binding(**first).require(fetches=True)
    with refused(f"{name} was ", " is "):
        binding(**changed).require(fetches=True)
    with refused(name):
        binding(**changed).require()
    binding(**first).require(fetches=True)


@pytest.mark.parametrize(
    "harmless",
    [
        {"fhir_base_url": "HTTPS://user:secret@One.example:443/fhir/?token=secret"},
        {"fhir_page_size": 7, "fhir_overlap_seconds": 1, "fhir_resource_types": "Patient", "fhir_deletes": "history"},
        {"fhir_bulk_level": "patient"},
        {"fhir_auth_scope": "system/*.rs"},
    ],
)
def test_other_settings_may_change(binding: Make, harmless: dict[str, Any]) -> None:
    binding().require(fetches=True)
    binding(**harmless).require(fetches=True)


def test_a_start_within_the_same_window_is_no_change(binding: Make) -> None:
    binding(fhir_partition="monthly", fhir_last_updated_gte="2024-01-02").require(fetches=True)
    binding(fhir_partition="monthly", fhir_last_updated_gte="2024-01-20").require(fetches=True)


def test_neither_the_message_nor_the_tables_nor_the_store_have_credentials(
    binding: Make, configure: Callable[..., Settings]
) -> None:
    binding(fhir_base_url="https://user:s3cret@one.example/fhir?key=s3cret").require(fetches=True)
    with pytest.raises(ConfigurationError) as caught:
        binding(fhir_base_url="https://user:s3cret@two.example/fhir?key=s3cret").require(fetches=True)
    assert "was https://one.example/fhir when" in str(caught.value)
    assert "is https://two.example/fhir now" in str(caught.value)
    with Warehouse(configure()).connect() as conn:
        assert "s3cret" not in repr(sources.read_settings(conn, "default"))
    marker = binding().store.blobs.get(MARKER)
    assert marker is not None
    assert b"s3cret" not in marker


def test_the_address_of_a_server_is_compared_without_its_spelling() -> None:
    assert describe_server("HTTPS://u:p@Host.example:443/a/b/?q=1#f") == "https://host.example/a/b"
    assert describe_server("http://[::1]:8080/fhir/") == "http://[::1]:8080/fhir"


def test_the_server_is_bound_by_the_first_load_that_fetches_from_it(binding: Make) -> None:
    binding(fhir_base_url="").require()
    binding().require()
    binding(fhir_base_url="https://two.example/fhir").require()
    binding().require(fetches=True)
    with refused("FHIR_BASE_URL"):
        binding(fhir_base_url="https://two.example/fhir").require()


def test_files_may_change_their_place_because_their_fingerprint_is_part_of_the_state(
    configure: Callable[..., Settings],
) -> None:
    names = {item.name for item in list_bound_settings(configure(fhir_source="ndjson", fhir_base_url="/data"))}
    assert names == {"FHIR_PARTITION", "FHIR_LAST_UPDATED_GTE", "FHIR_SOURCE"}


def test_an_empty_store_with_a_full_database_is_refused(binding: Make, tmp_path: Path) -> None:
    binding().require(fetches=True)
    with refused("store.json", "FHIR_STORE_URL", "FHIR_ASSETS_HOME"):
        binding(fhir_store_url=str(tmp_path / "other")).require(fetches=True)
    with refused("store.json"):
        binding(fhir_assets_home=tmp_path / "moved").require()


def test_the_store_of_another_database_is_refused(binding: Make, postgres: str) -> None:
    binding().require(fetches=True)
    with fresh_database(postgres) as other, refused("belongs to database", "DB_URL"):
        binding(db_url=other).require(fetches=True)


def test_a_store_that_was_taken_over_is_refused_to_its_former_database(
    configure: Callable[..., Settings], binding: Make, postgres: str
) -> None:
    binding().require(fetches=True)
    with fresh_database(postgres) as other:
        carry_over(configure(db_url=other))
        binding(db_url=other).require(fetches=True)
        with refused("belongs to database"):
            binding().require(fetches=True)


def test_a_moved_store_is_accepted_and_a_new_one_after_carry_over(
    configure: Callable[..., Settings], binding: Make, tmp_path: Path
) -> None:
    binding().require(fetches=True)
    (tmp_path / "home" / "store").rename(tmp_path / "moved")
    binding(fhir_store_url=str(tmp_path / "moved")).require(fetches=True)
    carry_over(configure(fhir_store_url=str(tmp_path / "new")))
    binding(fhir_store_url=str(tmp_path / "new")).require(fetches=True)


def test_a_crash_before_the_marker_was_written_is_repaired_by_the_next_load(
    binding: Make, configure: Callable[..., Settings]
) -> None:
    with Warehouse(configure()).connect() as conn:
        link = sources.create_link(conn)
    binding().require(fetches=True)
    marker = read_marker(binding().store)
    assert marker is not None
    assert (marker.id, marker.database) == (link.store_id, link.database_id)


def test_the_message_ends_with_what_to_do(binding: Make) -> None:
    binding().require(fetches=True)
    with pytest.raises(ConfigurationError) as caught:
        binding(fhir_partition="hourly").require()
    assert re.fullmatch(
        r"The settings of source default changed: FHIR_PARTITION was daily when the source was loaded, and is hourly "
        r"now\. Its windows and checkpoints belong to the old value: either restore the old value, or choose: "
        r"`fhir-assets sources carry-over` keeps what is loaded, and `fhir-assets sources start-anew` removes it and "
        r"loads the source again",
        str(caught.value),
    )
