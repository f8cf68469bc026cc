"""The set of seen versions behaves like a set."""

from hypothesis import given
from hypothesis import strategies as st

from fhir_assets.fhir.seen_versions import SeenVersions


@given(st.lists(st.tuples(st.text(max_size=2), st.none() | st.text(max_size=1))))
def test_a_key_is_new_once(keys: list[tuple[str, str | None]]) -> None:
    seen = SeenVersions()
    known: set[tuple[str, str | None]] = set()
    for key in keys:
        assert seen.add(key) is (key not in known)
        known.add(key)
    assert len(seen) == len(known)


def test_the_set_grows_without_losing_keys() -> None:
    seen = SeenVersions()
    keys = [(f"id-{n}", "1") for n in range(50_000)]
    assert all(seen.add(key) for key in keys)
    assert not any(seen.add(key) for key in keys)
    assert len(seen) == len(keys)
