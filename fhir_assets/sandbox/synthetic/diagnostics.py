"""Observations, specimens, laboratory reports and imaging."""

from fhir_assets.sandbox.synthetic.clock import date_time
from fhir_assets.sandbox.synthetic.codes import (
    BLOOD_PRESSURE,
    BMI,
    DIASTOLIC,
    HEIGHT,
    SMOKING,
    SMOKING_ANSWERS,
    SNOMED,
    SYSTOLIC,
    UCUM,
    VITALS,
    WEIGHT,
    Measure,
    Panel,
    concept,
    hl7,
)
from fhir_assets.sandbox.synthetic.people import Person, Resources, Visit, pick

_VITAL_SIGNS = hl7("observation-category", "vital-signs", "Vital Signs")
_LABORATORY = hl7("observation-category", "laboratory", "Laboratory")
_SOCIAL = hl7("observation-category", "social-history", "Social History")
_INTERPRETATION = {
    code: hl7("v3-ObservationInterpretation", code, name)
    for code, name in (("L", "Low"), ("N", "Normal"), ("H", "High"))
}
_LAB_REPORT = hl7("v2-0074", "LAB", "Laboratory")
_VENOUS_BLOOD = concept(SNOMED, "122555007", "Venous blood specimen")
_CHEST = '{"system":"http://snomed.info/sct","code":"51185008","display":"Thoracic structure"}'
_DICOM = "http://dicom.nema.org/resources/ontology/DCM"
_MODALITIES = (("DX", "1.2.840.10008.5.1.4.1.1.1.1"), ("CT", "1.2.840.10008.5.1.4.1.1.2"))


def _quantity(value: str, unit: str) -> str:
    return f'{{"value":{value},"unit":"{unit}","system":"{UCUM}","code":"{unit}"}}'


def _observation(person: Person, visit: Visit, category: str, code: str, rest: str, seconds: int = 300) -> str:
    """Return the JSON of an Observation that ends with ``rest``."""
    return (
        person.head("Observation", person.new_id("o"), visit.updated)
        + f',"status":"final","category":[{category}],"code":{code},"subject":{person.subject}'
        f',"encounter":{visit.encounter},"effectiveDateTime":"{date_time(visit.start + seconds)}"'
        f',"issued":"{date_time(visit.end)}",{rest}}}'
    )


def _draw_value(person: Person, measure: Measure) -> str:
    """Return a random value as text, with trailing zeros. About 85 % are in the normal range, and the rest above it."""
    spread = measure.high - measure.low
    draw = person.random.random()
    share = draw / 0.85 if draw < 0.85 else 1 + (draw - 0.85) * 3
    return f"{measure.low + share * spread:.{measure.places}f}"


def _value_quantity(measure: Measure, value: str) -> str:
    return f'"valueQuantity":{_quantity(value, measure.unit)}'


def generate_vital_signs(person: Person, visit: Visit) -> Resources:
    """Yield blood pressure with its components, and some of the other vital signs."""
    random = person.random
    pressure = random.random()
    systolic, diastolic = f"{105 + pressure * 55:.0f}", f"{65 + pressure * 33:.0f}"
    yield (
        "Observation",
        _observation(
            person,
            visit,
            _VITAL_SIGNS,
            BLOOD_PRESSURE,
            f'"performer":[{{"reference":"Practitioner/{visit.practitioner}"}}],"component":['
            f'{{"code":{SYSTOLIC},"valueQuantity":{_quantity(systolic, "mm[Hg]")}}},'
            f'{{"code":{DIASTOLIC},"valueQuantity":{_quantity(diastolic, "mm[Hg]")}}}]',
        ),
    )
    first = int(random.random() * len(VITALS))
    for n in range(2):
        measure = VITALS[(first + n) % len(VITALS)]
        yield (
            "Observation",
            _observation(
                person, visit, _VITAL_SIGNS, measure.code, _value_quantity(measure, _draw_value(person, measure))
            ),
        )


def generate_body_measurements(person: Person, visit: Visit) -> Resources:
    """Yield consistent height, weight and body mass index, and the smoking status."""
    age = person.age(visit.start)
    person.bmi *= 0.97 + person.random.random() * 0.06
    grown = min(age / 18, 1) ** 0.8
    height = f"{52 + (person.height - 52) * grown:.1f}"
    weight = f"{(float(height) / 100) ** 2 * person.bmi:.1f}"
    bmi = f"{float(weight) / (float(height) / 100) ** 2:.2f}"
    for measure, value in ((HEIGHT, height), (WEIGHT, weight), (BMI, bmi)):
        yield "Observation", _observation(person, visit, _VITAL_SIGNS, measure.code, _value_quantity(measure, value))
    answer = SMOKING_ANSWERS[person.number % len(SMOKING_ANSWERS) if age >= 18 else 0]
    yield (
        "Observation",
        _observation(person, visit, _SOCIAL, SMOKING, f'"valueCodeableConcept":{answer}'),
    )


def generate_laboratory_report(person: Person, visit: Visit, request: str, panel: Panel) -> Resources:
    """Yield a Specimen, its Observations and the DiagnosticReport. ``request`` is the id of their ServiceRequest."""
    specimen = person.new_id("sp")
    collected = date_time(visit.start + 420)
    yield (
        "Specimen",
        person.head("Specimen", specimen, visit.updated)
        + f',"identifier":[{{"system":"urn:oid:2.16.840.1.113883.19.5.5","value":"{specimen}"}}]'
        f',"status":"available","type":{_VENOUS_BLOOD},"subject":{person.subject}'
        f',"receivedTime":"{date_time(visit.start + 1500)}","request":[{{"reference":"ServiceRequest/{request}"}}]'
        f',"collection":{{"collector":{{"reference":"Practitioner/{visit.practitioner}"}},'
        f'"collectedDateTime":"{collected}","quantity":{_quantity("4.0", "mL")}}}}}',
    )
    results = []
    for measure in panel.measures:
        value = _draw_value(person, measure)
        high = float(value) > measure.high
        results.append(f'{{"reference":"Observation/{person.id}-o{person.serial + 1}"}}')
        yield (
            "Observation",
            _observation(
                person,
                visit,
                _LABORATORY,
                measure.code,
                f'{_value_quantity(measure, value)},"interpretation":[{_INTERPRETATION["H" if high else "N"]}]'
                f',"specimen":{{"reference":"Specimen/{specimen}"}}'
                f',"referenceRange":[{{"low":{_quantity(f"{measure.low:g}", measure.unit)},'
                f'"high":{_quantity(f"{measure.high:g}", measure.unit)}}}]',
                420,
            ),
        )
    yield (
        "DiagnosticReport",
        person.head("DiagnosticReport", person.new_id("dr"), visit.updated)
        + f',"identifier":[{{"system":"urn:oid:2.16.840.1.113883.19.5.6","value":"LAB-{specimen}"}}]'
        f',"basedOn":[{{"reference":"ServiceRequest/{request}"}}],"status":"final","category":[{_LAB_REPORT}]'
        f',"code":{panel.code},"subject":{person.subject},"encounter":{visit.encounter}'
        f',"effectiveDateTime":"{collected}","issued":"{date_time(visit.end + 3600)}"'
        f',"performer":[{{"reference":"Organization/{visit.organization}"}}]'
        f',"specimen":[{{"reference":"Specimen/{specimen}"}}],"result":[{",".join(results)}]'
        f',"conclusion":"{panel.name}: results as listed"}}',
    )


def generate_imaging_study(person: Person, visit: Visit) -> Resources:
    """Yield an ImagingStudy with one series."""
    modality, sop_class = pick(person.random, _MODALITIES)
    study = person.new_id("im")
    uid = f"2.25.{person.number + 1}{person.serial:04}"
    count = 2 if modality == "DX" else 12
    instances = ",".join(
        f'{{"uid":"{uid}.1.{n}","sopClass":{{"system":"urn:ietf:rfc:3986","code":"urn:oid:{sop_class}"}},"number":{n}}}'
        for n in range(1, count + 1)
    )
    started = date_time(visit.start + 900)
    yield (
        "ImagingStudy",
        person.head("ImagingStudy", study, visit.updated)
        + f',"identifier":[{{"use":"official","system":"urn:dicom:uid","value":"urn:oid:{uid}"}}]'
        f',"status":"available","modality":[{{"system":"{_DICOM}","code":"{modality}"}}],"subject":{person.subject}'
        f',"encounter":{visit.encounter},"started":"{started}","numberOfSeries":1,"numberOfInstances":{count}'
        f',"location":{{"reference":"Location/{visit.location}"}}'
        f',"series":[{{"uid":"{uid}.1","number":1,"modality":{{"system":"{_DICOM}","code":"{modality}"}}'
        f',"numberOfInstances":{count},"bodySite":{_CHEST},"started":"{started}","instance":[{instances}]}}]}}',
    )
