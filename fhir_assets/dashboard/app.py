"""The page that `fhir-assets dashboard` and `fhir-assets dev` serve. Streamlit runs this file for each visit."""

from collections.abc import Sequence

import streamlit as st

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import FhirAssetsError
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.postgres.db import roles
from fhir_assets.warehouse.postgres.queries import dashboard
from fhir_assets.warehouse.postgres.queries.dashboard import Answer

# How long the answers are shown before the database is asked again. Streamlit would write a docstring to the page.
_SECONDS = 300

_MISSING = "Nothing of this type is loaded yet, or the view of schema marts does not exist (fhir-assets migrate)."
_NO_ROWS = f"Nothing to show: there are no rows, or all groups have fewer than {dashboard.SMALLEST_GROUP} patients."


def read_answers() -> tuple[str, dict[str, Answer | None]]:
    """Return with which rights the tables are read, and the answer of each panel by its name."""
    with Warehouse(load_settings()).connect_as_reader() as conn:
        return roles.describe_reader(conn), {panel.name: dashboard.read(conn, panel) for panel in dashboard.PANELS}


def show(rights: str, answers: dict[str, Answer | None]) -> None:
    """Write all panels to the page."""
    st.caption(f"This page reads the database {rights}.")
    st.header("Population")
    _show_bars(answers[dashboard.POPULATION.name], x="age", y="patients", color="gender")
    st.header("Current conditions")
    _show_table(answers[dashboard.CONDITIONS.name])
    st.header("Encounters a month")
    _show_bars(answers[dashboard.ENCOUNTERS.name], x="month", y="encounters", color="class")
    st.header("Laboratory results")
    _show_table(answers[dashboard.LABS.name])
    st.header("Completeness")
    _show_tables([answers[panel.name] for panel in dashboard.COMPLETENESS])
    st.header("Freshness")
    _show_tables([answers[panel.name] for panel in dashboard.FRESHNESS])


def _as_columns(answer: Answer) -> dict[str, list[object]]:
    return {name: [row[number] for row in answer.rows] for number, name in enumerate(answer.columns)}


def _show_bars(answer: Answer | None, *, x: str, y: str, color: str) -> None:
    if answer is None or not answer.rows:
        st.info(_MISSING if answer is None else _NO_ROWS)
    else:
        st.bar_chart(_as_columns(answer), x=x, y=y, color=color)


def _show_table(answer: Answer | None) -> None:
    if answer is None or not answer.rows:
        st.info(_MISSING if answer is None else _NO_ROWS)
    else:
        st.dataframe(_as_columns(answer), hide_index=True)


def _show_tables(answers: Sequence[Answer | None]) -> None:
    """Write the rows of answers with the same columns to one table."""
    found = [answer for answer in answers if answer]
    rows = [row for answer in found for row in answer.rows]
    _show_table(Answer(found[0].columns, rows) if found else None)


st.set_page_config(page_title="fhir_assets", layout="wide")
st.title("What the tables hold")
st.caption(
    f"Counts of at least {dashboard.SMALLEST_GROUP} patients; read again after {_SECONDS // 60} minutes. "
    "Smaller groups are not shown."
)
try:
    show(*st.cache_data(read_answers, ttl=_SECONDS, show_spinner="Reading the tables …")())
except FhirAssetsError as error:
    st.error(str(error))
