"""The type model of R4: nested types, choices, ancestors and reference targets."""

from fhir_assets.fhir.model import r4, suggest_name


def test_a_nested_type_is_named_by_its_path() -> None:
    model = r4()
    contact = model.element("Patient", "contact")
    assert contact is not None
    assert contact.types == ("Patient.contact",)
    assert contact.many
    assert model.types["Patient.contact"].base == "BackboneElement"


def test_a_content_reference_has_the_type_that_it_refers_to() -> None:
    item = r4().element("Questionnaire.item", "item")
    assert item is not None
    assert item.types == ("Questionnaire.item",)


def test_a_choice_has_a_json_name_for_each_type() -> None:
    value = r4().types["Observation"].elements["value"]
    assert value.choice
    assert ("valueQuantity", "Quantity") in value.json_names()
    assert r4().types["Observation"].json["valueQuantity"] == (value, "Quantity")


def test_types_have_their_ancestors() -> None:
    model = r4()
    assert model.ancestors("code") == ("code", "string", "Element")
    assert model.is_a("Patient", "Resource")
    assert model.is_a("Age", "Quantity")
    assert not model.is_a("Quantity", "Age")


def test_references_know_their_targets() -> None:
    subject = r4().element("Encounter", "subject")
    assert subject is not None
    assert subject.targets == ("Group", "Patient")


def test_every_type_of_every_element_is_known() -> None:
    model = r4()
    names = {type_ for owner in model.types.values() for element in owner.elements.values() for type_ in element.types}
    assert names <= model.types.keys()


def test_the_nearest_name_is_suggested_only_if_it_is_similar() -> None:
    assert suggest_name("birthdate", ["birthDate", "id"]) == '; did you mean "birthDate"?'
    assert suggest_name("zzz", ["birthDate", "id"]) == ""
