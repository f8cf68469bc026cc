"""A view of which every column has another ``phi`` tag, and a Patient with a value for each of the columns."""

from fhir_assets_tests.support.views import column, patient, view


def tagged_column(name: str, path: str, kind: str, **tags: str) -> dict[str, object]:
    """Return a column of a ViewDefinition with tags, whose names are given with underscores for hyphens."""
    return {
        **column(name, path, kind),
        "tag": [{"name": tag.replace("_", "-"), "value": value} for tag, value in tags.items()],
    }


TAGGED_PATIENT = view(
    "patient",
    "Patient",
    column("gender", "gender", "code"),
    tagged_column("family", "name.first().family", "string", phi="encrypt"),
    tagged_column("mrn", "identifier.first().value", "string", phi="encrypt", phi_index="hmac", index="btree"),
    tagged_column("ssn", "identifier.skip(1).first().value", "string", phi="hash", index="btree"),
    tagged_column("born", "birthDate", "date", phi="year", index="btree"),
    tagged_column("died", "deceased.ofType(dateTime)", "dateTime", phi="year"),
    tagged_column("multiple", "multipleBirth.ofType(integer)", "integer", phi="encrypt"),
    tagged_column("note", "text.div", "xhtml", phi="drop"),
    column("weight", "extension.first().value.ofType(decimal)", "decimal"),
)
PATIENT_WITH_PHI = patient(
    "a",
    gender="female",
    name=[{"family": "O'Hara\t\\N"}],
    identifier=[{"value": "MRN-1"}, {"value": "078-05-1120"}],
    birthDate="1980-02-29",
    deceasedDateTime="2020-05-01T23:30:00-02:00",
    multipleBirthInteger=2,
    text={"status": "generated", "div": "<div xmlns='http://www.w3.org/1999/xhtml'>O'Hara</div>"},
)
