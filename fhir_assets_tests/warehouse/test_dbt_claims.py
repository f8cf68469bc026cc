"""The dbt models of coverages and claims, on Postgres and DuckDB."""

from datetime import date, timedelta

from fhir_assets_tests.support.dbt_tables import Execute, insert, insert_claim
from fhir_assets_tests.support.dbt_tables import execute as execute
from fhir_assets_tests.support.dbt_tables import models as models

LOCAL = "http://hospital.test/products"
NDC = "http://hl7.org/fhir/sid/ndc"
BLUE_BUTTON = "https://bluebutton.cms.gov/resources/variables/"


def test_an_item_of_a_pharmacy_is_in_pharmacy_claims_only(execute: Execute) -> None:
    for key, npi in (("doctor", "1000000004"), ("other", "1000000012")):
        insert(execute, "stg_practitioner", id=key, npi=npi)
    insert(execute, "stg_organization", id="pharmacy", npi="1234567893")
    insert(execute, "stg_coverage", id="c", patient_key="a", member_id="M1", plan_name="Gold")
    item = {"sequence": "3", "product_system": NDC, "product_code": "0071-0155-23", "quantity_value": "2.5"}
    amounts = (("drugcost", "20"), ("benefit", "15"), ("paidtoprovider", "15"), ("paidbypatient", "5"))
    claim = {
        "provider_organization_key": "pharmacy",
        "coverage_key": "c",
        "insurer_display": "Insurer",
        "payment_date": "2024-02-01",
        "billable_period_start_date": "2024-01-15",
    }
    insert_claim(execute, "drug", item, amounts, type_code="pharmacy", **claim)
    for index, (role, practitioner) in enumerate((("primary", "other"), ("prescribing", "doctor"))):
        member = {"role_code": role, "practitioner_key": practitioner}
        table = "stg_explanation_of_benefit_care_team"
        insert(execute, table, explanation_of_benefit_key="drug", index=index, **member)
    for index, (category, value) in enumerate((("dayssupply", "30"), ("refillnum", "1"))):
        information = {"category_code": category, "value_quantity_value": value}
        table = "stg_explanation_of_benefit_supporting_info"
        insert(execute, table, explanation_of_benefit_key="drug", index=index, **information)
    insert_claim(execute, "visit", {}, type_code="professional")
    insert_claim(execute, "asked", {}, type_code="pharmacy", use="preauthorization")
    insert_claim(execute, "estimated", {}, type_code="professional", use="predetermination")
    (row,) = execute("SELECT * FROM tuva__pharmacy_claim")
    assert row[:13] == (
        *("drug", 3, "a", "M1", "Insurer", "Gold", "1000000004", "1234567893", date(2024, 1, 15), "00071015523"),
        *(2.5, 30, 1),
    )
    assert row[13:17] == (date(2024, 2, 1), 15, 20, None)
    assert execute("SELECT claim_id FROM tuva__medical_claim") == [("visit",)]


def test_the_prescriber_of_a_pharmacy_claim_without_one_is_that_of_the_prescription(execute: Execute) -> None:
    insert(execute, "stg_practitioner", id="doctor", npi="1000000004")
    insert(execute, "stg_medication_request", id="rx", requester_key="doctor")
    insert_claim(execute, "drug", {}, type_code="pharmacy", prescription_key="rx")
    query = "SELECT claim_line_number, prescribing_provider_npi, ndc_code FROM tuva__pharmacy_claim"
    assert execute(query) == [(1, "1000000004", None)]


def test_a_national_drug_code_has_the_11_digits_of_claims(execute: Execute) -> None:
    codes = {"0071-0155-23": "00071015523", "50580-449-5": "50580044905", "50242-0040-62": "50242004062"}
    codes["00071015523"] = "00071015523"
    for code in codes:
        insert_claim(execute, code, {"product_system": NDC, "product_code": code}, type_code="pharmacy")
    insert_claim(execute, "other", {"product_system": LOCAL, "product_code": "0071-0155-23"}, type_code="pharmacy")
    rows = execute("SELECT claim_id, ndc_code FROM tuva__pharmacy_claim")
    assert dict(rows) == {**codes, "other": None}


def test_a_payment_that_a_payer_states_twice_counts_once(execute: Execute) -> None:
    insert_claim(execute, "carin", {}, (("benefit", "80"), ("paidtoprovider", "50"), ("paidtopatient", "30")))
    insert_claim(execute, "provider", {}, (("paidtoprovider", "50"), ("paidtopatient", "30")))
    insert_claim(
        execute,
        "medicare",
        {},
        ((BLUE_BUTTON + "line_nch_pmt_amt", "70"), (BLUE_BUTTON + "line_prvdr_pmt_amt", "70")),
    )
    insert_claim(execute, "synthea", {}, ((BLUE_BUTTON + "line_prvdr_pmt_amt", "60"),))
    rows = execute("SELECT claim_id, paid_amount FROM tuva__medical_claim ORDER BY 1")
    assert rows == [("carin", 80), ("medicare", 70), ("provider", 80), ("synthea", 60)]


def test_a_coverage_without_an_end_is_a_plan_until_today(execute: Execute) -> None:
    insert(execute, "stg_organization", id="o", name="Insurer")
    insert(execute, "stg_organization", id="e", name="Employer")
    insert(execute, "stg_patient", id="p")
    ((today,),) = execute("SELECT current_date")
    tomorrow = today + timedelta(days=1)
    for key, columns in (
        ("ended", {"period_start_date": "2020-01-01", "period_end_date": "2020-12-31", "payor_display": "Payer"}),
        ("future", {"period_start_date": tomorrow, "group_name": "Group"}),
        ("open", {"period_start_date": "2021-01-01", "payor_key": "o", "policy_holder_organization_key": "e"}),
        ("draft", {"status": "draft"}),
    ):
        insert(execute, "stg_coverage", id=key, patient_key="p", plan_value=key, subscriber_id="S1", **columns)
    assert execute(
        "SELECT plan_source_value, payer_plan_period_start_date, payer_plan_period_end_date, payer_source_value,"
        " sponsor_source_value, family_source_value FROM omop__payer_plan_period"
        " JOIN omop__person USING (person_id) ORDER BY 1"
    ) == [
        ("ended", date(2020, 1, 1), date(2020, 12, 31), "Payer", None, "S1"),
        ("future", tomorrow, tomorrow, None, "Group", "S1"),
        ("open", date(2021, 1, 1), today, "Insurer", "Employer", "S1"),
    ]


def test_the_cost_of_an_item_is_that_of_its_prescription_procedure_or_visit(execute: Execute) -> None:
    insert(execute, "stg_encounter", id="visit", patient_key="a")
    insert(execute, "stg_procedure", id="operation", patient_key="a", encounter_key="visit")
    insert(execute, "stg_procedure", id="wrong", patient_key="a", status="entered-in-error")
    insert(execute, "stg_medication_request", id="rx", patient_key="a")
    insert(execute, "stg_coverage", id="c", patient_key="a")
    for key, procedure in (("operated", "operation"), ("wrong", "wrong")):
        table = "stg_explanation_of_benefit_procedure"
        insert(execute, table, explanation_of_benefit_key=key, index="0", sequence="1", procedure_key=procedure)
    in_visit = {"encounter_key": "visit", "net_value": "100", "net_currency": "USD", "revenue_code": "0450"}
    amounts = (("submitted", "120"), ("eligible", "90"), ("benefit", "60"), ("copay", "10"), ("coinsurance", "5"))
    insert_claim(execute, "seen", in_visit, amounts, coverage_key="c")
    insert_claim(execute, "operated", {**in_visit, "procedure_sequence": "1", "net_currency": "EUR"})
    insert_claim(execute, "wrong", {**in_visit, "procedure_sequence": "1"})
    insert_claim(execute, "drug", {}, (("priorpayerpaid", "3"),), type_code="pharmacy", prescription_key="rx")
    insert_claim(execute, "nothing", {"net_value": "7"})
    insert_claim(execute, "asked", in_visit, use="preauthorization")
    drg = {"explanation_of_benefit_key": "seen", "category_code": "drg", "code": "470"}
    insert(execute, "stg_explanation_of_benefit_supporting_info", index="0", **drg)
    columns = (
        "cost_domain_id, total_charge, total_paid, paid_by_payer, paid_by_patient, paid_by_primary, amount_allowed,"
        " currency_concept_id, revenue_code_source_value, revenue_code_concept_id, drg_source_value, drg_concept_id"
    )
    empty = (None, None, None)
    assert execute(f"SELECT {columns} FROM omop__cost ORDER BY cost_domain_id, total_charge DESC") == [
        ("Drug", None, 3, None, None, 3, None, 44818668, None, None, None, None),
        ("Procedure", 100, *empty, None, None, 0, "0450", 0, None, None),
        ("Visit", 120, 75, 60, 15, None, 90, 44818668, "0450", 0, "470", 0),
        ("Visit", 100, *empty, None, None, 44818668, "0450", 0, None, None),
    ]
    for table, key, count in (
        ("drug_exposure", "drug_exposure_id", 1),
        ("procedure_occurrence", "procedure_occurrence_id", 1),
        ("visit_occurrence", "visit_occurrence_id", 2),
    ):
        query = f"SELECT count(*) FROM omop__cost JOIN omop__{table} ON {key} = cost_event_id"
        assert execute(query) == [(count,)], table
    query = "SELECT count(*) FROM omop__cost JOIN omop__payer_plan_period USING (payer_plan_period_id)"
    assert execute(query) == [(1,)]
